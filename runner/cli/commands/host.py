"""`loom host ls` and `loom host run`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import to_builtins
from rich.table import Table
from rich.text import Text

from loom.agents.host.node_host import BACKLOG, SLOTS, NodeHost
from loom.bus.bus import Bus
from loom.bus.host_directory import AnnouncedHost, announced_hosts
from loom.bus.logs import discard_reports
from loom.bus.logs.discard_reports import DiscardReport
from loom.bus.logs.logger import get_logger
from loom.bus.service_discovery import health_reports
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.common import AsLines, add_row, connected, print_json
from loom.runner.cli.entry import DEFAULT_URL, FOREVER_S, prepare, report_ready, run_service, run_to_end, until_lost
from loom.runner.cli.file_lifespan import entered
from loom.runner.cli.input_files import NodeFile, load_node_file
from loom.runner.cli.process_exit import EXTRA_S
from loom.runner.cli.views.tables import console, one_line, table_of
from loom.runner.node_overview import CALL_S
from loom.runner.services import running_nodes
from loom.runner.settings import Settings

log = get_logger()

EXAMPLES = """
    loom host run agents.py
    loom host run agents.py --slots 8 --max-nodes 4
    loom host ls
"""


def ls(as_json: AsLines = False) -> None:
    """List the node hosts that are alive, and counts of their messages that phases left out."""
    run_to_end(_ls(prepare("warning"), as_json=as_json))


async def _ls(settings: Settings, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        hosts, reports = await asyncio.gather(announced_hosts(bus, CALL_S), health_reports(bus))
        omitted = discard_reports.merged_reports(
            [*(report.left_out for of_phase in reports.values() for report in of_phase), bus.discards.hosts]
        )
    if as_json:
        for host in hosts:
            print_json({**_as_object(host), "alive": True, "left_out": omitted.pop(host.name, DiscardReport())})
        for name, counts in omitted.items():
            print_json({"host_id": name, "alive": False, "left_out": counts})
        return
    screen = console()
    screen.print(_table(hosts) if hosts else "no hosts answer: start one with `loom host run FILE.py`")
    for name, counts in omitted.items():
        screen.print(Text(one_line(f"{name}: left out: {counts.summary}")), soft_wrap=True)


def _as_object(host: AnnouncedHost) -> dict[str, Any]:
    """Return an announcement as free JSON."""
    return {"owner": host.owner, **to_builtins(host), "slots": host.slots}


def _table(hosts: Sequence[AnnouncedHost]) -> Table:
    numbers = ("slots", "running", "queued")
    table = table_of(("host", *numbers, "state", "nodes"), right=numbers, ratios={"nodes": 1})
    table.columns[-1].no_wrap = False
    for host in hosts:
        state = "draining" if host.draining else "takes work"
        state += ", can start nodes" if host.can_spawn else ""
        state += f", {host.stuck} stuck" if host.stuck else ""
        counts = (str(host.slots), str(host.running), str(host.queued))
        add_row(table, host.name, *counts, state, ", ".join(host.node_ids))
    return table


def run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.py", help="Python file that defines the list `nodes` and optionally `lifespan`."),
    ],
    slots: Annotated[int, typer.Option(min=1, help="Runs each node executes at once.")] = SLOTS,
    backlog: Annotated[int, typer.Option(min=0, help="Runs each node queues in addition.")] = BACKLOG,
    max_nodes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Clone nodes under load, up to N in total; idle clones are removed."),
    ] = None,
) -> None:
    """Host the nodes that a file defines on the server of NATS_URL. Waits for the server."""
    settings = prepare("info")
    loaded = load_node_file(file)
    if max_nodes is not None and max_nodes < len(loaded.nodes):
        raise typer.BadParameter(f"{file} has {len(loaded.nodes)} nodes already", param_hint="--max-nodes")
    hosts: list[NodeHost] = []

    def give_back() -> None:
        for host in hosts:
            host.give_back()

    def runs_in_hand() -> str:
        count = sum(host.active_runs for host in hosts)
        runs = f"{count} run{'' if count == 1 else 's'} in hand"
        wait = f", waiting up to {settings.cluster.drain_timeout_s:.0f} s" if count else ""
        return f"stopping: {runs}{wait}; Ctrl-C again stops at once"

    limit_s = settings.cluster.drain_timeout_s + loaded.close_s + EXTRA_S
    work = _run(settings, loaded, slots, backlog, max_nodes, hosts)
    run_service(work, limit_s=limit_s, last_words=give_back, on_stop=runs_in_hand)


async def _run(
    settings: Settings, loaded: NodeFile, slots: int, backlog: int, max_nodes: int | None, hosts: list[NodeHost]
) -> None:
    url = settings.nats_url or DEFAULT_URL
    log.info("connecting", server=Bus(url).connection.address)
    hosted = running_nodes(
        url,
        lambda: loaded.nodes,
        namespace=settings.loom_namespace,
        identity=settings.identity,
        slots=slots,
        backlog=backlog,
        max_nodes=max_nodes,
        drain_timeout_s=settings.cluster.drain_timeout_s,
        patience_s=FOREVER_S,
    )
    async with entered(loaded.lifespan, loaded.path), hosted as host:
        hosts.append(host)
        report_ready(f"{', '.join(node.id for node in loaded.nodes)} on {host.bus.connection.address}")
        await until_lost(host.bus)


app = command_group("Host agent nodes, and list the hosts of the cluster.", EXAMPLES, ls, run)
