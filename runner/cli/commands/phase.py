"""`loom phase run`."""

from contextlib import AbstractAsyncContextManager
from typing import Annotated

import typer

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.runner import log_output
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.entry import DEFAULT_URL, FOREVER_S, phase_model, prepare, report_ready, run_service, until_lost
from loom.runner.services import running_phases
from loom.runner.settings import Settings
from loom.runner.supervisor import STOP_GRACE_S, end_with_parent
from loom.schemas.envelope import PHASES, Phase

log = get_logger()

TERMINAL = "terminal"
"""Value of `--supervised` when the parent process logs to a terminal."""
EXAMPLES = """
    loom phase run execute
    NATS_URL=nats://db1:4222 loom phase run sense match
"""


def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help=f"Any of {', '.join(PHASES)}.")],
    supervised: Annotated[
        str, typer.Option(hidden=True, help="Stop when standard input ends; log in this format.")
    ] = "",
) -> None:
    """Run the named phases on the server of NATS_URL. Waits for the server and for `loom init`."""
    settings = prepare("info")
    if supervised:
        log_output.configure(settings.loom_log_level, readable=supervised == TERMINAL)
        end_with_parent(settings.cluster.drain_timeout_s + STOP_GRACE_S)
    run_service(_run(settings, _phases(names)))


def _phases(names: list[str]) -> tuple[Phase, ...]:
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PHASES)}", param_hint="NAME")
    return tuple(name for name in PHASES if name in names)


async def _run(settings: Settings, names: tuple[Phase, ...]) -> None:
    async with phases_at(settings.nats_url or DEFAULT_URL, names, settings, init=False) as bus:
        report_ready(f"{', '.join(names)} on {bus.connection.address}")
        await until_lost(bus)


def phases_at(
    url: str, names: tuple[Phase, ...], settings: Settings, *, init: bool
) -> AbstractAsyncContextManager[Bus]:
    """Return a context manager that runs phases on the server at `url` and waits for that server without limit.

    Args:
        init: Whether to create the streams and buckets as well.
    """
    log.info("connecting", server=Bus(url).connection.address)
    return running_phases(
        url,
        names=names,
        namespace=settings.loom_namespace,
        identity=settings.identity,
        config=settings.cluster,
        llm=phase_model(settings),
        patience_s=FOREVER_S,
        init=init,
    )


app = command_group("Run phases in a process of their own.", EXAMPLES, run)
