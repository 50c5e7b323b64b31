"""One measurement of one system in the world of a scenario."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from bench.measure import Contender, Load, load
from bench.scenarios.scenario import Scenario

WARM_UP_SHARE, WARM_UP_IN_FLIGHT = 4, 16


@dataclass(frozen=True)
class Measurement:
    """The figures of one system with one task in flight and with many."""

    single: Load
    many: Load
    failures: Mapping[str, int]
    """Code of an error -> tasks that have failed with it."""

    @property
    def cpu_us(self) -> float:
        """CPU time for each task of all processes, with many in flight."""
        return self.many.cpu_total_us


async def measure(system: AbstractAsyncContextManager[Contender], scenario: Scenario, *, fewer: int = 1) -> Measurement:
    """Start a system, warm it up, and measure it; `fewer` is that of `measure_running`."""
    async with system as contender:
        return await measure_running(contender, scenario, fewer=fewer)


async def measure_running(contender: Contender, scenario: Scenario, *, fewer: int = 1) -> Measurement:
    """Warm a running system up, and measure it.

    Args:
        fewer: Divides the number of tasks, for a slow system.
    """
    tasks = max(scenario.tasks // fewer, 1)
    await contender.carry(max(tasks // WARM_UP_SHARE, 1), min(WARM_UP_IN_FLIGHT, scenario.in_flight))
    single = await load(contender, scenario.single, 1)
    many = await load(contender, tasks, scenario.in_flight)
    return Measurement(single, many, dict(getattr(contender, "failures", {})))
