"""`loom node ls`, `show` and `move`."""

from hashlib import blake2b
from typing import Annotated, Any, NamedTuple

import typer
from rich.text import Text

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.phases.adapt.evidence_statistics import changed_at, margin_of_error, trend
from loom.phases.adapt.retirement_policy import inherited_rewards
from loom.phases.adapt.reward_weights import attempt_id
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.common import AsLines, connected, domain_slug, node_name, print_json
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.views.node_tables import domain_table, domains_of_node_table, node_table, state_of
from loom.runner.cli.views.tables import console, one_line
from loom.runner.node_overview import NodeOverview, node_overviews
from loom.runner.settings import Settings
from loom.schemas.errors import LoomError
from loom.schemas.identity import node_key, qualified, split_qualified
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.tokens import is_token

EXAMPLES = """
    loom node ls
    loom node ls --domain code
    loom node show acme.coder
    loom node move coder coder-2
"""


class UnknownNode(LoomError):
    """No node of that name is alive or remembered."""

    code = "unknown_node"


class NoEvidence(LoomError):
    """Nothing is known of the node whose evidence is to be moved."""

    code = "no_evidence"


class _Node(NamedTuple):
    owner: str
    node_id: str

    def __str__(self) -> str:
        return qualified(*self)


def ls(
    as_json: AsLines = False,
    domain: Annotated[
        str | None, typer.Option("--domain", metavar="DOMAIN", help="List only nodes known in this domain, in detail.")
    ] = None,
) -> None:
    """List the nodes that are alive or remembered, one row for each."""
    run_to_end(_ls(prepare("warning"), domain_slug(domain), as_json=as_json))


async def _ls(settings: Settings, token: str | None, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        nodes = await node_overviews(bus, settings.cluster)
    if token is not None:
        nodes = [node for node in nodes if token in node.domains]
    if as_json:
        for node in nodes:
            print_json(as_object(node))
        return
    screen = console()
    if not nodes and token is not None:
        screen.print("nothing is known of any node in this domain; `loom node ls` lists the domains of each")
    elif not nodes:
        screen.print("no nodes are alive or remembered: start some with `loom host run FILE.py`")
    else:
        screen.print(node_table(nodes) if token is None else domain_table(nodes, token))


def show(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node: NODE, or OWNER.NODE.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the node as JSON.")] = False,
) -> None:
    """Show one node: its hosts, and what is known of it in each domain."""
    run_to_end(_show(prepare("warning"), node_name(node) or "", as_json=as_json))


async def _show(settings: Settings, name: str, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        nodes = {node.name: node for node in await node_overviews(bus, settings.cluster)}
    node = nodes.get(name)
    if node is None:
        raise UnknownNode(f"no node {name} is alive or remembered: `loom node ls` lists the nodes")
    if as_json:
        print_json(as_object(node))
        return
    screen = console()
    hosts = ", ".join(host.name for host in node.hosts) or "none"
    screen.print(Text.assemble((one_line(node.name), "bold"), "  ", state_of(node)))
    screen.print(Text(f"hosts: {one_line(hosts)}"), soft_wrap=True)
    if node.profile is not None:
        profile = node.profile
        screen.print(
            f"{profile.total_tasks} tasks, {profile.consecutive_losses} failures in a row, {profile.tokens} tokens"
        )
    screen.print(domains_of_node_table(node) if node.domains else "nothing is known of it in any domain")


def as_object(node: NodeOverview) -> dict[str, Any]:
    """Return what is known of a node as free JSON."""
    evidence = {token: overview.evidence for token, overview in node.domains.items() if overview.evidence.count}
    changes = {token: changed_at(known) for token, known in evidence.items()}
    return {
        "node_id": node.node_id,
        "owner": node.owner,
        "alive": node.alive,
        "hosts": [host.name for host in node.hosts],
        "standing": node.standing,
        "domains": {token: overview.domain for token, overview in node.domains.items()},
        "self_ratings": {
            token: overview.self_rating for token, overview in node.domains.items() if overview.self_rating is not None
        },
        "uncertainty": {token: margin_of_error(known) for token, known in evidence.items()},
        "trend": {token: trend(known) for token, known in evidence.items()},
        "changed_at": {token: at for token, at in changes.items() if at is not None},
        "profile": node.profile,
    }


def move(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The old name: NODE, or OWNER.NODE.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The new name: NODE, or OWNER.NODE.")],
) -> None:
    """Give a renamed node the mean rewards of its old name or owner.

    Each mean counts as one observation in its domain. Repeating the command changes nothing.
    """
    before, after = _node(source, "FROM"), _node(target, "TO")
    if before == after:
        raise typer.BadParameter(f"FROM and TO are both {before}", param_hint="TO")
    run_to_end(_move(prepare("warning"), before, after))


def _node(text: str, hint: str) -> _Node:
    node = _Node(*split_qualified(text))
    if not all(map(is_token, node)):
        raise typer.BadParameter(f"{text!r} is not a node: write NODE, or OWNER.NODE", param_hint=hint)
    return node


async def _move(settings: Settings, before: _Node, after: _Node) -> None:
    async with connected(settings) as bus:
        profiles = bus.bucket("nodes", NodeProfile)
        stored, heir = await profiles.get(node_key(*before)), await profiles.get(node_key(*after))
        rewards = list(inherited_rewards(stored.value, *after, why=f"is now {after}")) if stored is not None else []
        if stored is None or not rewards:
            raise NoEvidence(f"nothing is known of {before}: `loom node ls` lists the nodes with what is known of each")
        for reward in rewards:
            tasks = len(stored.value.domains[reward.domain_token].scores)
            known = f"{before} → {after}: {reward.domain_token} {reward.score:.2f} of {tasks} rewards"
            if heir is not None and _has(heir.value, reward):
                typer.echo(f"{known}, moved before")
                continue
            await _publish(bus, reward)
            typer.echo(f"{known}, as one observation")


def _has(heir: NodeProfile, reward: Reward) -> bool:
    """Return whether the profile contains the moved reward already."""
    evidence = heir.domains.get(reward.domain_token)
    inherited = {score.attempt_id: score.score for score in evidence.scores} if evidence else {}
    return inherited.get(attempt_id(reward)) == reward.score


async def _publish(bus: Bus, reward: Reward) -> None:
    subject = bus.subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token)
    digest = blake2b(repr(reward.score).encode(), digest_size=4).hexdigest()  # evidence that has changed is new
    await store_once(bus, subject, reward, msg_id=f"{reward.reward_id}:{reward.node}:{reward.domain_token}:{digest}")


app = command_group("List nodes, show one, and move evidence to a renamed node.", EXAMPLES, ls, show, move)
