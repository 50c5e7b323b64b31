"""What SENSE's own guesses are corrected by: how far they have been off in a domain so far."""

import asyncio
from collections.abc import Mapping

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.natsio.kv import BucketReader
from loom.schemas.envelope import Spec
from loom.schemas.learning import BIAS, Calibration

LEAST = 3
"""Tasks behind a bias before it is used."""


class Calibrations:
    """Follows what ADAPT learns of SENSE."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: dict[str, Calibration] = {}
        self._reader: BucketReader[Calibration] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is known, and go on reading."""
        self._reader = self._bus.bucket("tuning", Calibration).reader(f"{BIAS}*")
        while not self._reader.caught_up:
            await self._learn(self._reader)
        self._task = self._bus.tasks.spawn(self._follow(self._reader), name="follow calibrations", essential=True)

    async def stop(self) -> None:
        """Follow no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._reader is not None:
            await self._reader.stop()

    def apply(self, guess: Spec) -> Spec:
        """Return a guess of SENSE's own, corrected."""
        return calibrated(guess, self._known)

    async def _follow(self, reader: BucketReader[Calibration]) -> None:
        while True:
            await self._learn(reader)

    async def _learn(self, reader: BucketReader[Calibration]) -> None:
        self._known |= {
            entry.value.domain_token: entry.value
            for entry in await reader.batch()
            if entry.key == BIAS + entry.value.domain_token
        }


def calibrated(guess: Spec, known: Mapping[str, Calibration]) -> Spec:
    """Return the guess with the bias of its domain added, within 0 and 1, once three tasks stand behind that.

    The guess itself stays beside it: a bias is learned from what SENSE says by itself.

    Args:
        guess: With a complexity that the ad did not give.
        known: domain_token -> calibration.
    """
    guess = replace(guess, estimated=guess.complexity)
    learned = known.get(guess.domain_token)
    if learned is None or learned.count < LEAST:
        return guess
    complexity = round(min(1.0, max(0.0, guess.complexity + learned.bias)), 4)
    note = f"complexity {guess.complexity:.2f} by itself, {learned.bias:+.2f} by {learned.count} tasks before"
    return replace(guess, complexity=complexity, note="; ".join(part for part in (guess.note, note) if part))
