"""`loom` on a machine whose wall clock jumps by the offset in the file named by STEP_FILE.

What settimeofday or an NTP correction does to a machine, without its monotonic clock.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

_real = time.time
_file = Path(os.environ["STEP_FILE"])


def _stepped() -> float:
    with suppress(OSError, ValueError):
        return _real() + float(_file.read_text())
    return _real()


time.time = _stepped

if __name__ == "__main__":
    from loom.runner.cli.app import main

    main()
