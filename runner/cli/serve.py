"""What keeps running: `loom up`, `loom phase`, `loom node`."""

import errno
import socket
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Annotated

import structlog
import typer

from loom.agents.host import BACKLOG, SLOTS
from loom.agents.node import Node
from loom.bus.client import Bus
from loom.runner.cli.loading import load_nodes
from loom.runner.cli.running import DEFAULT_URL, FOREVER_S, prepare, run_service, sense_model, until_lost
from loom.runner.cluster import running_nodes, running_phases
from loom.runner.embedded import embedded_server
from loom.runner.settings import Settings
from loom.schemas.envelope import PHASES, Phase
from loom.schemas.errors import BusUnavailable

log = structlog.get_logger()

PORT = 4222


def up(
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of the server on 127.0.0.1; 0 takes any free one.")
    ] = PORT,
) -> None:
    """Start a server and the six phases, and keep them running; with NATS_URL set, the phases alone."""
    run_service(_up(prepare("info"), port))


def phase(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help=f"Any of {', '.join(PHASES)}.")],
) -> None:
    """Run these phases on the server of NATS_URL, waiting for it if need be."""
    run_service(_phase(prepare("info"), _phases(names)))


def node(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="Python file that defines `nodes`, a list.")],
    slots: Annotated[int, typer.Option(min=1, help="Runs each node works on at once.")] = SLOTS,
    backlog: Annotated[int, typer.Option(min=0, help="Runs each node queues besides.")] = BACKLOG,
) -> None:
    """Host the nodes a file defines on the server of NATS_URL, waiting for it if need be."""
    settings = prepare("info")
    run_service(_node(settings, load_nodes(file), slots, backlog))


async def _up(settings: Settings, port: int) -> None:
    async with AsyncExitStack() as stack:
        url = settings.nats_url
        if not url:
            check_free(port)
            store = Path(settings.loom_store) if settings.loom_store else None
            url = (await stack.enter_async_context(embedded_server(store, port=port or -1))).url
        bus = await stack.enter_async_context(_phases_on(url, PHASES, settings))
        _say(_welcome(settings, bus.address))
        await until_lost(bus)


async def _phase(settings: Settings, names: tuple[Phase, ...]) -> None:
    async with _phases_on(settings.nats_url or DEFAULT_URL, names, settings) as bus:
        _say(f"{', '.join(names)} on {bus.address}")
        await until_lost(bus)


def _phases_on(url: str, names: tuple[Phase, ...], settings: Settings) -> AbstractAsyncContextManager[Bus]:
    log.info("connecting", server=Bus(url).address)
    return running_phases(
        url,
        names=names,
        namespace=settings.loom_namespace,
        config=settings.cluster,
        llm=sense_model(settings),
        patience_s=FOREVER_S,
    )


async def _node(settings: Settings, nodes: list[Node], slots: int, backlog: int) -> None:
    url = settings.nats_url or DEFAULT_URL
    log.info("connecting", server=Bus(url).address)
    hosted = running_nodes(
        url,
        lambda: nodes,
        namespace=settings.loom_namespace,
        slots=slots,
        backlog=backlog,
        drain_timeout_s=settings.cluster.drain_timeout_s,
        patience_s=FOREVER_S,
    )
    async with hosted as host:
        _say(f"{', '.join(node.id for node in nodes)} on {host.bus.address}")
        await until_lost(host.bus)


def check_free(port: int) -> None:
    """Return if `port` of 127.0.0.1 can be listened on; 0 always can.

    Raises:
        BusUnavailable: It is taken, or not ours to take.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed one is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise BusUnavailable(f"port {port} {why}; choose another with --port, or set NATS_URL") from error


def _phases(names: list[str]) -> tuple[Phase, ...]:
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PHASES)}", param_hint="NAME")
    return tuple(name for name in PHASES if name in names)


def _welcome(settings: Settings, address: str) -> str:
    """Where the cluster is, and the next three commands as they must be typed here."""
    prefix = "" if settings.nats_url or address == DEFAULT_URL else f"NATS_URL={address} "
    return "\n".join(
        (
            f"loom is up on {address}, namespace {settings.loom_namespace}",
            f"  {prefix}loom node FILE.py              adds agents",
            f'  {prefix}loom submit "what is to do"    hands in work',
            f"  {prefix}loom tap                       shows all traffic",
            "Ctrl-C stops it",
        )
    )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the command's answer; who waits for it through a pipe gets it now
