"""`loom up`."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.service_discovery import ServiceInstance, check_processes, discover
from loom.bus.wire_version import WireMismatch
from loom.runner.cli.commands.phase import TERMINAL, phases_at
from loom.runner.cli.entry import DEFAULT_URL, FOREVER_S, prepare, report_ready, run_service, until_lost
from loom.runner.retried_start import until_started
from loom.runner.server.listening import LOOPBACK, check_free, is_loopback
from loom.runner.server.nats_server import embedded_server
from loom.runner.server.store import check_unused, default_store, log_store
from loom.runner.settings import Settings
from loom.runner.supervisor import STOP_GRACE_S, Program, Supervisor, keep_alive, labelled
from loom.schemas.envelope import PHASES, Phase

log = get_logger()

PORT = 4222
MOST_REPLICAS = 64
ASK_AGAIN_S = 0.1
EXAMPLES = """
    loom up
    loom up --ephemeral --port 0
    LOOM_TOKEN=long-secret-token-0 loom up --host 0.0.0.0
    NATS_URL=nats://db1:4222 loom up --processes --replicas execute=3
"""


def up(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of the server; 0 selects a free port.")] = PORT,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; other machines need LOOM_TOKEN.")
    ] = LOOPBACK,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that other machines can reach without a token.")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for records and evidence; default: LOOM_STORE, or the user's data folder."
        ),
    ] = None,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="Delete all data at the end of the command.")] = False,
    processes: Annotated[
        bool, typer.Option("--processes", help="Run each phase in its own process, restarted when it dies.")
    ] = False,
    replicas: Annotated[
        list[str] | None,
        typer.Option(metavar="PHASE=N", help="With --processes: N processes for a phase. Repeatable."),
    ] = None,
) -> None:
    """Start a server and the six phases. With NATS_URL set, start only the phases."""
    settings = prepare("info")
    counts = _counts(replicas or [])
    if replicas and not processes:
        raise typer.BadParameter("needs --processes", param_hint="--replicas")
    if ephemeral and store is not None:
        raise typer.BadParameter("keeps nothing, so there is no use for --store", param_hint="--ephemeral")
    if settings.nats_url and (ephemeral or store is not None or host != LOOPBACK):
        raise typer.BadParameter("NATS_URL names a server, and no other is started", param_hint="--store, --host")
    if not insecure and not settings.loom_token and not is_loopback(host):
        hint = "set LOOM_TOKEN, which clients then need, or add --insecure where every client may use the server"
        raise typer.BadParameter(f"{host} can be reached from other machines: {hint}", param_hint="--host")
    kept = None if ephemeral or settings.nats_url else store or _store_of(settings)
    run_service(_up(settings, Server(host, port, kept), _programs(counts) if processes else None))


class Server(NamedTuple):
    """The server that `loom up` starts."""

    host: str
    port: int
    store: Path | None
    """None: a temporary folder."""


def _store_of(settings: Settings) -> Path:
    return Path(settings.loom_store) if settings.loom_store else default_store(settings.loom_namespace)


async def _up(settings: Settings, server: Server, programs: list[Program] | None) -> None:
    async def cluster(url: str) -> None:
        welcome = partial(_welcome, settings, server)
        await (
            _in_here(url, settings, welcome) if programs is None else _in_processes(url, settings, programs, welcome)
        )

    if settings.nats_url:
        await cluster(settings.nats_url)
        return
    if server.store is not None:
        check_unused(server.store)  # a server that has the store most likely has the port too, and its error is clearer
    check_free(server.host, server.port)
    started = embedded_server(
        server.store,
        host=server.host,
        port=server.port or -1,
        token=settings.loom_token,
        sync_interval=settings.loom_sync_interval or None,
    )
    async with started as running:
        log_store(server.store)
        try:
            await _first_to_end(cluster(running.url), keep_alive(running))
        except WireMismatch as error:
            raise error.in_store(server.store) from None


async def _in_here(url: str, settings: Settings, welcome: Callable[[str], str]) -> None:
    async with phases_at(url, PHASES, settings, init=True) as bus:
        report_ready(welcome(bus.connection.address))
        await until_lost(bus)


async def _in_processes(url: str, settings: Settings, programs: list[Program], welcome: Callable[[str], str]) -> None:
    log.info("connecting", server=Bus(url).connection.address)
    names = [program.name for program in programs]
    async with Bus(
        url, namespace=settings.loom_namespace, role="operator", identity=settings.identity, patience_s=FOREVER_S
    ) as bus:
        topology.check_version(bus)
        await check_processes(bus)
        # Here once, so that what a start waits for is logged by one process.
        await until_started(partial(topology.apply, bus, settings.cluster), patience_s=FOREVER_S)
        supervisor = Supervisor(
            programs,
            environment={**os.environ, "NATS_URL": url},
            stop_s=settings.cluster.drain_timeout_s + STOP_GRACE_S,
            write_line=labelled(names),
        )
        async with supervisor:
            await _all_present(bus, Counter(name.partition("-")[0] for name in names))
            report_ready(welcome(bus.connection.address))
            await until_lost(bus)


async def _all_present(bus: Bus, wanted: Counter[str]) -> None:
    """Return once the wanted number of processes of each phase answers."""

    def all_here(processes: list[ServiceInstance]) -> bool:
        return wanted <= Counter(process.metadata["service"] for process in processes)

    while True:
        if all_here(await discover(bus, enough=all_here)):
            return
        await asyncio.sleep(ASK_AGAIN_S)


async def _first_to_end(*works: Coroutine[Any, Any, None]) -> None:
    """Run coroutines concurrently until one ends or fails; cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for ended in (task for task in tasks if task.done()):
            ended.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _programs(counts: dict[Phase, int]) -> list[Program]:
    """Return a program for each process, named `match`, or `execute-1`, `execute-2` where there are several."""
    audience = TERMINAL if sys.stderr.isatty() else "pipe"
    command = (sys.executable, "-m", "loom.runner.cli", "phase", "run", "--supervised", audience)
    return [
        Program(name if counts[name] == 1 else f"{name}-{number}", (*command, name))
        for name in PHASES
        for number in range(1, counts[name] + 1)
    ]


def _counts(replicas: list[str]) -> dict[Phase, int]:
    counts = dict.fromkeys(PHASES, 1)
    for text in replicas:
        name, _, number = text.partition("=")
        known = [phase for phase in PHASES if phase == name]
        if not known or not number.isdecimal() or not 1 <= int(number) <= MOST_REPLICAS:
            most = f"a phase and 1 to {MOST_REPLICAS}, such as execute=3"
            raise typer.BadParameter(f"{text!r} is not {most}", param_hint="--replicas")
        counts[known[0]] = int(number)
    return counts


def _welcome(settings: Settings, server: Server, address: str) -> str:
    """Return the address of the cluster, its store folder, and three further commands as typed here."""
    lines = [f"loom is up on {address}, namespace {settings.loom_namespace}"]
    if not settings.nats_url:
        kept = server.store.absolute() if server.store is not None else None
        lines.append(f"  records and evidence are kept in {kept}" if kept else "  nothing is kept (--ephemeral)")
        if not is_loopback(server.host):
            lines.append(f"  it listens on {server.host} for other machines")
    own = "" if settings.nats_url or address == DEFAULT_URL else f"NATS_URL={address} "
    if settings.loom_token and not settings.nats_url:
        own = f"NATS_URL=nats://$LOOM_TOKEN@{address.removeprefix('nats://')} "
    return "\n".join(
        (
            *lines,
            f"  {own}loom host run FILE.py          hosts agents",
            f'  {own}loom submit "what is to do"    submits a task',
            f"  {own}loom tap                       shows all traffic",
            "Ctrl-C stops it",
        )
    )
