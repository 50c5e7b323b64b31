"""An EXECUTE in a process of its own that dies or stops while a delegation is under way."""

import signal
from collections.abc import Callable
from typing import Any

from loom.bus.bus import Bus
from loom.phases.execute.delegation import Errands
from loom.phases.execute.run_stream import Watch
from support.crashing import Orders, Patch, after, before, phase, sent


def _to_sense(bus: Bus, message: Any, *_: Any) -> bool:
    parsed = bus.subjects.parse(message.subject)
    return parsed is not None and parsed.tokens.get("phase") == "sense"


POINTS: dict[str, Patch] = {
    "heard": before(Errands, "_run"),
    "noted": after(Errands, "_note"),
    "stored": sent(Bus, "_confirm", _to_sense),
    "ended": before(Watch, "hand"),
    "handed": after(Watch, "hand"),
}
"""Where it may die or stop -> how to have it do so."""


async def execute(
    say: Callable[[Any], None], orders: Orders, url: str, namespace: str, point: str, how: signal.Signals
) -> None:
    """Run EXECUTE, which kills or stops itself when a delegation first reaches `point`."""
    await phase(say, orders, url, namespace, "execute", point, how, points=POINTS)
