"""Phases of a checkout in one process: `python run_phases.py PHASE…`."""

import asyncio
import os
import sys
from collections.abc import Sequence

from bench.checkout.event_loop import run
from bench.checkout.loom_names import Phase, configure_logs, from_environment, running_phases

PATIENCE_S = 30.0


async def run_phases(names: Sequence[Phase]) -> None:
    """Run the phases until the process is ended."""
    settings = from_environment()
    phases = running_phases(
        os.environ["NATS_URL"],
        names=names,
        namespace=settings.loom_namespace,
        config=settings.cluster,
        patience_s=PATIENCE_S,
    )
    async with phases:
        print("ready", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Run the phases that the command line names."""
    configure_logs("error")
    run(run_phases(sys.argv[1:]))  # type: ignore[arg-type]  # the names of phases


if __name__ == "__main__":
    main()
