"""How the loop scales, piece by piece: `python tests/bench/scales.py`."""

import argparse
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from bench.auctions import many_hosts, many_nodes
from bench.deltas import many_deltas
from bench.durable import durability
from bench.idle import backlog, idle, start_up
from loom.runner import log_output
from loom.runner.cli.entry import run_to_end

Measure = Callable[..., Coroutine[Any, Any, None]]
MEASURES: dict[str, Measure] = {
    "hosts": many_hosts,
    "nodes": many_nodes,
    "deltas": many_deltas,
    "start": start_up,
    "idle": idle,
    "backlog": backlog,
    "durability": durability,
}
QUEUED = 100_000
MINUTES, QUICK_MINUTES = 12, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="Which; all by default.")
    parser.add_argument("--quick", action="store_true", help="Fewer of everything.")
    parser.add_argument("--queued", type=int, default=QUEUED, help=f"Tasks of the backlog; {QUEUED:,} by default.")
    given = parser.parse_args()
    log_output.configure("error")
    if not given.only:
        print(f"all measures take up to {QUICK_MINUTES if given.quick else MINUTES} minutes", flush=True)
    measures: dict[str, Measure] = {**MEASURES, "backlog": partial(backlog, queued=given.queued)}
    for name in given.only or measures:
        print(f"-- {name}: {MEASURES[name].__doc__}", flush=True)
        run_to_end(measures[name](quick=given.quick))


if __name__ == "__main__":
    main()
