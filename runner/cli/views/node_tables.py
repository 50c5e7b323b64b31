"""Tables of nodes and of what is known of them."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from loom.bus.host_directory import AnnouncedHost
from loom.phases.adapt.evidence_statistics import RECENT_SCORES, changed_at, margin_of_error, mean_reward, trend
from loom.phases.shared.node_health import Standing
from loom.runner.cli.common import add_row, clock, sparkline
from loom.runner.cli.views.tables import table_of
from loom.runner.node_overview import RECENT_TASKS, DomainOverview, NodeOverview
from loom.schemas.learning.profile import NodeProfile

STYLES: dict[Standing, str] = {
    "new": "dim",
    "unproven": "",
    "healthy": "green",
    "warning": "yellow",
    "failing": "red",
}
NOTHING = "\N{EN DASH}"


def node_table(nodes: Sequence[NodeOverview]) -> Table:
    """Return a table with a row for each node."""
    numbers = ("load", "tasks", "losses", "tokens")
    columns = ("node", "standing", *numbers, "last", "mean reward")
    table = table_of(columns, right=numbers, ratios={"node": 1, "mean reward": 1})
    table.columns[-1].no_wrap = False
    for node in nodes:
        profile = node.profile or NodeProfile(node_id=node.node_id)
        load = " ".join(load_of(host) for host in node.hosts) or NOTHING
        counts = (str(profile.total_tasks), str(profile.consecutive_losses), str(profile.tokens))
        last = clock(profile.updated_at) if profile.updated_at else NOTHING
        by_domain = ", ".join(
            f"{overview.domain} {_number(mean_reward(overview.evidence))}" for overview in _best_known_first(node)
        )
        add_row(table, node.name, state_of(node), load, *counts, last, by_domain or NOTHING)
    table.caption = (
        "new: no task judged yet. unproven: fewer than ten. load: runs of the host's slots, + queued. "
        "losses: failures in a row. `--domain` shows one domain in full."
    )
    return table


def state_of(node: NodeOverview) -> Text:
    """Return the standing of a node, or that no host has it; what it earned before is in its profile."""
    return Text(node.standing, STYLES[node.standing]) if node.alive else Text("not alive", "dim")


def _best_known_first(node: NodeOverview) -> list[DomainOverview]:
    return sorted(node.domains.values(), key=lambda overview: (-overview.evidence.count, overview.domain))


def load_of(host: AnnouncedHost) -> str:
    """Return how busy a host is: runs of slots, and what is queued besides."""
    return f"{host.running}/{host.slots}" + (f"+{host.queued}" if host.queued else "")


def domain_table(nodes: Sequence[NodeOverview], token: str) -> Table:
    """Return a table with a row for each node in one domain; each of the nodes has that domain."""
    overviews = {node.name: node.domains[token] for node in nodes}
    numbers = ("self-rating", "mean reward", "count", "trend")
    changes = any(changed_at(overview.evidence) is not None for overview in overviews.values())
    columns = ("node", "standing", *numbers, "newest", *(("changed",) if changes else ()))
    title = next(iter(overviews.values())).domain
    table = table_of(columns, title=title, right=numbers, ratios={"node": 1})
    for node in sorted(nodes, key=lambda node: -(mean_reward(overviews[node.name].evidence) or 0.0)):
        shown = _evidence(overviews[node.name])[: len(columns) - 2]
        add_row(table, node.name, state_of(node), *shown)
    table.caption = (
        f"self-rating: as last given in the {RECENT_TASKS} newest tasks. mean reward: over count, in 19 of 20 cases "
        f"within ±. trend: the newest {RECENT_SCORES} against the mean."
        + (" changed: what came before is forgotten." if changes else "")
    )
    return table


def domains_of_node_table(node: NodeOverview) -> Table:
    """Return a table with a row for each domain in which something is known of a node."""
    numbers = ("self-rating", "mean reward", "count", "trend")
    changes = any(changed_at(overview.evidence) is not None for overview in node.domains.values())
    columns = ("domain", *numbers, "newest", *(("changed",) if changes else ()))
    table = table_of(columns, right=numbers, ratios={"domain": 1})
    for overview in _best_known_first(node):
        add_row(table, overview.domain, *_evidence(overview)[: len(columns) - 1])
    return table


def _evidence(overview: DomainOverview) -> tuple[str, str, str, str, str, str]:
    """Return self-rating, mean, count, trend, newest scores and change as text."""
    evidence = overview.evidence
    mean, slope, change = mean_reward(evidence), trend(evidence), changed_at(evidence)
    return (
        _number(overview.self_rating),
        NOTHING if mean is None else f"{mean:.2f} ±{margin_of_error(evidence):.2f}",
        str(evidence.count),
        NOTHING if slope is None else f"{slope:+.2f}",
        sparkline(score.score for score in evidence.scores[-RECENT_SCORES:]),
        "" if change is None else clock(change),
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
