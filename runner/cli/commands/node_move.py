"""What is known of a node that has changed its name or owner: `loom node move`."""

from hashlib import blake2b
from typing import Annotated, NamedTuple

import typer

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.phases.adapt.retirement_policy import inherited_rewards
from loom.phases.adapt.reward_weights import attempt_id
from loom.runner.cli.common import connected
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.settings import Settings
from loom.schemas.errors import LoomError
from loom.schemas.identity import node_key, qualified, split_qualified
from loom.schemas.learning import NodeProfile, Reward
from loom.schemas.task import is_token


class NoEvidence(LoomError):
    """Nothing is known of the node whose evidence is to be handed on."""

    code = "no_evidence"


class _Node(NamedTuple):
    owner: str
    node_id: str

    def __str__(self) -> str:
        return qualified(*self)


def move(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The node as it was: NODE, or OWNER.NODE.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The node as it is now.")],
) -> None:
    """Hand on what is known of a node that has changed its name or owner: its mean reward in each domain.

    It counts as one observation in each domain. A second time changes nothing.
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
            raise NoEvidence(f"nothing is known of {before}: `loom nodes` lists the nodes with what is known of each")
        for reward in rewards:
            tasks = len(stored.value.domains[reward.domain_token].scores)
            known = f"{before} → {after}: {reward.domain_token} {reward.score:.2f} of {tasks} rewards"
            if heir is not None and _has(heir.value, reward):
                typer.echo(f"{known}, handed on before")
                continue
            await _publish(bus, reward)
            typer.echo(f"{known}, as one observation")


def _has(heir: NodeProfile, reward: Reward) -> bool:
    """Return whether the heir has folded that inheritance already."""
    evidence = heir.domains.get(reward.domain_token)
    inherited = {score.attempt_id: score.score for score in evidence.scores} if evidence else {}
    return inherited.get(attempt_id(reward)) == reward.score


async def _publish(bus: Bus, reward: Reward) -> None:
    subject = bus.subjects.of("reward", reward.source, reward.owner, reward.node_id, reward.domain_token)
    digest = blake2b(repr(reward.score).encode(), digest_size=4).hexdigest()  # evidence that has changed is new
    await store_once(bus, subject, reward, msg_id=f"{reward.reward_id}:{reward.node}:{reward.domain_token}:{digest}")
