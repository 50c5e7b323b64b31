"""One phase in a process of its own: prints how long its start takes, and its memory, as JSON.

Run by `test_ten_thousand_nodes.py` as `python phase_memory.py URL NAMESPACE PHASE`.
"""

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from loom.bus.bus import Bus
from loom.phases.adapt import Adapt
from loom.phases.match import Match
from loom.schemas.config import ClusterConfig


async def measure(url: str, namespace: str, phase: str) -> dict[str, Any]:
    """Start a phase, let it do what a start has caused, and return its figures."""
    async with Bus(url, namespace=namespace, role=phase) as bus:
        service: Any = Adapt(bus, ClusterConfig()) if phase == "adapt" else Match(bus, ClusterConfig())
        began = time.monotonic()
        await service.start()
        started_s, known = time.monotonic() - began, 0
        if phase == "adapt":
            known = len(service._profiles)
            while service._writer._summaries.unchecked:
                await service._flush()
            await service._snapshots._publish()
        else:
            known = len(service._directory.profiles)
        worked_s = time.monotonic() - began - started_s
        peak_mb = _peak_mb()
        await service.drain(1)
    return {"started_s": round(started_s, 2), "worked_s": round(worked_s, 2), "peak_mb": round(peak_mb), "nodes": known}


def _peak_mb() -> float:
    """Return the most resident memory so far; `ru_maxrss` would count the process that has started this one."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(*sys.argv[1:]))))
