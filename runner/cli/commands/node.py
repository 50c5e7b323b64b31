"""Who works here: `loom nodes`, `loom hosts`."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from msgspec import to_builtins
from rich.table import Table
from rich.text import Text

from loom.bus.host_directory import AnnouncedHost, announced_hosts
from loom.bus.logs import left_out
from loom.bus.logs.left_out import LeftOut
from loom.bus.service_discovery import health_reports
from loom.phases.shared.node_health import Standing
from loom.runner.cli.common import AsLines, add_row, clock, connected, domain_slug, print_json, sparkline
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.views.tables import console, one_line, table_of
from loom.runner.node_overview import CALL_S, NEWEST, RECENT_TASKS, DomainOverview, NodeOverview, node_overviews
from loom.runner.settings import Settings
from loom.schemas.learning import NodeProfile

STYLES: dict[Standing, str] = {
    "new": "dim",
    "unproven": "",
    "healthy": "green",
    "warning": "yellow",
    "failing": "red",
}
NOTHING = "\N{EN DASH}"


def nodes(
    as_json: AsLines = False,
    domain: Annotated[
        str | None, typer.Option("--domain", metavar="DOMAIN", help="Show what is known of each node in this domain.")
    ] = None,
) -> None:
    """Show the nodes that are alive or remembered, and what is known of each."""
    run_to_end(_nodes(prepare("warning"), domain_slug(domain), as_json=as_json))


def hosts(as_json: AsLines = False) -> None:
    """Show the node hosts that are alive, and what phases left out of what hosts sent."""
    run_to_end(_hosts(prepare("warning"), as_json=as_json))


async def _nodes(settings: Settings, token: str | None, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        found = await node_overviews(bus, settings.cluster)
    if token is not None:
        found = [node for node in found if token in node.domains]
    if as_json:
        for node in found:
            print_json(as_object(node))
        return
    screen = console()
    if not found and token is not None:
        screen.print("nothing is known of any node in this domain; `loom nodes` lists the domains of each")
    elif not found:
        screen.print("no nodes are alive or remembered: start some with `loom node FILE.py`")
    else:
        screen.print(_all(found) if token is None else _in_domain(found, token))


async def _hosts(settings: Settings, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        here, reports = await asyncio.gather(announced_hosts(bus, CALL_S), health_reports(bus))
        omitted = left_out.together(
            [*(report.left_out for each in reports.values() for report in each), bus.discards.hosts]
        )
    if as_json:
        for host in here:
            print_json({**_host_object(host), "alive": True, "left_out": omitted.pop(host.name, LeftOut())})
        for name, one in omitted.items():
            print_json({"host_id": name, "alive": False, "left_out": one})
        return
    screen = console()
    if here:
        screen.print(_hosts_table(here))
    else:
        screen.print("no hosts answer: start one with `loom node FILE.py`")
    for name, one in omitted.items():
        screen.print(Text(one_line(f"{name}: left out: {one.words}")), soft_wrap=True)


def _host_object(host: AnnouncedHost) -> dict[str, Any]:
    """Return what a host has announced as free JSON."""
    return {"owner": host.owner, **to_builtins(host), "slots": host.slots}


def _hosts_table(here: Sequence[AnnouncedHost]) -> Table:
    numbers = ("slots", "running", "queued")
    table = table_of(("host", *numbers, "state", "nodes"), right=numbers, ratios={"nodes": 1})
    table.columns[-1].no_wrap = False
    for host in here:
        state = "draining" if host.draining else "takes work"
        state += ", can start nodes" if host.can_spawn else ""
        state += f", {host.stuck} stuck" if host.stuck else ""
        counts = (str(host.slots), str(host.running), str(host.queued))
        add_row(table, host.name, *counts, state, ", ".join(host.node_ids))
    return table


def as_object(node: NodeOverview) -> dict[str, Any]:
    """Return what is known of a node as free JSON."""
    known = {token: each for token, each in node.domains.items() if each.count}
    return {
        "node_id": node.node_id,
        "owner": node.owner,
        "alive": node.alive,
        "hosts": [host.name for host in node.hosts],
        "standing": node.standing,
        "domains": {token: each.domain for token, each in node.domains.items()},
        "self_ratings": {
            token: each.self_rating for token, each in node.domains.items() if each.self_rating is not None
        },
        "uncertainty": {token: each.uncertainty for token, each in known.items()},
        "trend": {token: each.trend for token, each in known.items()},
        "changed_at": {token: each.changed_at for token, each in known.items() if each.changed_at is not None},
        "profile": node.profile,
    }


def _all(found: Sequence[NodeOverview]) -> Table:
    """A row for each node."""
    numbers = ("load", "tasks", "losses", "tokens")
    columns = ("node", "standing", *numbers, "last", "mean reward")
    table = table_of(columns, right=numbers, ratios={"node": 1, "mean reward": 1})
    table.columns[-1].no_wrap = False
    for node in found:
        profile = node.profile or NodeProfile(node_id=node.node_id)
        load = " ".join(load_of(host) for host in node.hosts) or "not alive"
        counts = (str(profile.total_tasks), str(profile.consecutive_losses), str(profile.tokens))
        last = clock(profile.updated_at) if profile.updated_at else NOTHING
        how = Text(node.standing, STYLES[node.standing])
        by_domain = ", ".join(f"{each.domain} {_number(each.mean)}" for each in _best_known_first(node))
        add_row(table, node.name, how, load, *counts, last, by_domain or NOTHING)
    table.caption = (
        "new: no task judged yet. unproven: fewer than ten. load: runs of the host's slots, + queued. "
        "losses: failures in a row. `--domain` shows one domain in full."
    )
    return table


def _best_known_first(node: NodeOverview) -> list[DomainOverview]:
    return sorted(node.domains.values(), key=lambda each: (-each.count, each.domain))


def load_of(host: AnnouncedHost) -> str:
    """Return how busy a host is: runs of slots, and what is queued besides."""
    return f"{host.running}/{host.slots}" + (f"+{host.queued}" if host.queued else "")


def _in_domain(found: Sequence[NodeOverview], token: str) -> Table:
    """A row for each node of which something is known in one domain."""
    here = {node.name: node.domains[token] for node in found}
    numbers = ("self-rating", "mean reward", "count", "trend")
    changes = any(each.changed_at is not None for each in here.values())
    columns = ("node", "standing", *numbers, "newest", *(("changed",) if changes else ()))
    title = next(iter(here.values())).domain
    table = table_of(columns, title=title, right=numbers, ratios={"node": 1})
    for node in sorted(found, key=lambda node: -(here[node.name].mean or 0.0)):
        shown = _evidence(here[node.name])[: len(columns) - 2]
        add_row(table, node.name, Text(node.standing, STYLES[node.standing]), *shown)
    table.caption = (
        f"self-rating: as last given in the {RECENT_TASKS} newest tasks. mean reward: over count, in 19 of 20 cases "
        f"within ±. trend: the newest {NEWEST} against the mean."
        + (" changed: what came before is forgotten." if changes else "")
    )
    return table


def _evidence(known: DomainOverview) -> tuple[str, str, str, str, str, str]:
    """Self-rating, mean, count, trend, newest scores and change."""
    mean = NOTHING if known.mean is None else f"{known.mean:.2f} ±{known.uncertainty:.2f}"
    trend = NOTHING if known.trend is None else f"{known.trend:+.2f}"
    newest = sparkline(score.score for score in known.evidence.scores[-NEWEST:])
    changed = "" if known.changed_at is None else clock(known.changed_at)
    return _number(known.self_rating), mean, str(known.count), trend, newest, changed


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
