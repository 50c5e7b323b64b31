"""Reads the calibrations of ADAPT: the bias of SENSE's own complexity estimates, per domain."""

import asyncio
from collections.abc import Mapping

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.kv import BucketReader
from loom.schemas.envelope import Spec
from loom.schemas.learning.calibration import BIAS, Calibration

MIN_TASKS = 3
"""Number of tasks from which a bias is applied."""


class CalibrationReader:
    """Follows the calibrations in the bucket `tuning` and applies them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._calibrations: dict[str, Calibration] = {}
        self._reader: BucketReader[Calibration] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the stored calibrations, and follow their changes."""
        self._reader = self._bus.bucket("tuning", Calibration).reader(f"{BIAS}*")
        while not self._reader.caught_up:
            await self._read_batch(self._reader)
        self._task = self._bus.tasks.spawn(self._follow(self._reader), name="follow calibrations", essential=True)

    async def stop(self) -> None:
        """Stop following changes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._reader is not None:
            await self._reader.stop()

    def apply(self, estimate: Spec) -> Spec:
        """Return an estimate of SENSE, corrected by the bias of its domain."""
        return calibrated(estimate, self._calibrations)

    async def _follow(self, reader: BucketReader[Calibration]) -> None:
        while True:
            await self._read_batch(reader)

    async def _read_batch(self, reader: BucketReader[Calibration]) -> None:
        self._calibrations |= {
            entry.value.domain_token: entry.value
            for entry in await reader.batch()
            if entry.key == BIAS + entry.value.domain_token
        }


def calibrated(estimate: Spec, calibrations: Mapping[str, Calibration]) -> Spec:
    """Return the estimate with the bias of its domain added, within 0 and 1, if at least three tasks support the bias.

    The uncorrected estimate is kept in `estimated`, because ADAPT learns the bias from it.

    Args:
        estimate: With a complexity that the ad did not give.
        calibrations: domain_token -> calibration.
    """
    estimate = replace(estimate, estimated=estimate.complexity)
    calibration = calibrations.get(estimate.domain_token)
    if calibration is None or calibration.count < MIN_TASKS:
        return estimate
    complexity = round(min(1.0, max(0.0, estimate.complexity + calibration.bias)), 4)
    note = (
        f"complexity {estimate.complexity:.2f} by itself, {calibration.bias:+.2f} by {calibration.count} tasks before"
    )
    return replace(estimate, complexity=complexity, note="; ".join(part for part in (estimate.note, note) if part))
