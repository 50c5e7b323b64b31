"""Phases under cProfile: SIGUSR1 begins it, SIGUSR2 ends it and writes BENCH_PROFILE."""

import cProfile
import os
import signal
from pathlib import Path

from bench.checkout.run_phases import main

profile = cProfile.Profile()


def begin(_number: int, _frame: object) -> None:
    profile.enable()


def end(_number: int, _frame: object) -> None:
    profile.disable()
    file = Path(os.environ["BENCH_PROFILE"])
    profile.dump_stats(file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    main()
