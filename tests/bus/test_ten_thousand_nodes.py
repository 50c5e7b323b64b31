"""Ten thousand nodes of one domain with full windows: start, memory, snapshots and rebuild."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import support.phase_memory
from support.builders import reward

from loom.bus.bus import Bus
from loom.phases.adapt.rebuild import compare
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile, Score

NODES = 10_000
MAX_MB = 300
"""Most memory of MATCH, and of ADAPT."""
CONCURRENT = 256
WITHIN_S = 300


def profiles(at: float) -> Iterator[NodeProfile]:
    """Yield profiles with full windows whose attempts ended before `at`."""
    random = Random(16)
    for number in range(NODES):
        scores = tuple(
            Score(
                attempt_id=f"{random.getrandbits(128):032x}:1",
                score=float(random.random() < 0.9),
                ended_at=at - (WINDOW - place) * random.uniform(0.9, 1.0),
            )
            for place in range(WINDOW)
        )
        scores = tuple(sorted(scores, key=lambda score: score.ended_at))
        losses = sum(score.score < 0.5 for score in scores)
        mean = sum(score.score for score in scores) / WINDOW
        evidence = DomainEvidence(
            scores=scores, count=WINDOW, mean=mean, since=scores[0].ended_at, losses=losses, untested=number % 8
        )
        yield NodeProfile(
            node_id=f"node-{number}",
            last_seq=1,
            domains={"code": evidence},
            total_tasks=WINDOW,
            success_rate=(WINDOW - losses) / WINDOW,
            updated_at=scores[-1].ended_at,
        )


async def measured(bus: Bus, phase: str) -> dict[str, Any]:
    """Return the figures of a phase that starts in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(support.phase_memory.__file__)),
        bus.connection.address,
        bus.subjects.namespace,
        phase,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), WITHIN_S)
    finally:
        if process.returncode is None:
            process.kill()
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    print(f"{phase}: started in {figures['started_s']} s, then worked {figures['worked_s']} s; {figures['peak_mb']} MB")
    return figures


@pytest.mark.slow
@pytest.mark.timeout(2 * WITHIN_S)
async def test_ten_thousand_nodes_with_full_windows_start_stay_small_and_are_rebuilt(mortal: Bus) -> None:
    bus = mortal
    first = reward(1, node="node-0")
    subject = bus.subjects.of("reward", first.source, first.owner, first.node_id, first.domain_token)
    await bus.jetstream.publish(subject, first)
    bucket, rest = bus.bucket("nodes", NodeProfile), profiles(bus.clock.now() - 1)
    while chunk := list(islice(rest, CONCURRENT)):
        await asyncio.gather(*(bucket.create(profile.key, profile) for profile in chunk))

    adapt, match = await measured(bus, "adapt"), await measured(bus, "match")
    assert adapt["nodes"] == match["nodes"] == NODES
    assert adapt["peak_mb"] < MAX_MB
    assert match["peak_mb"] < MAX_MB

    stream = bus.subjects.stream("REWARDS")
    assert (await bus.jetstream.api(f"STREAM.INFO.{stream}"))["state"]["messages"] == NODES + 1
    await bus.jetstream.api(f"STREAM.PURGE.{stream}", {"filter": subject})  # the stream has dropped its head
    rebuilt, compared = await compare(bus, forget=True)
    assert rebuilt.start.whole
    assert Counter(node.verdict for node in compared) == {"same": NODES}

    await bus.jetstream.api(f"STREAM.PURGE.KV_{bus.subjects.bucket('nodes')}")
    from_snapshots = await measured(bus, "adapt")
    assert from_snapshots["nodes"] == NODES
    assert from_snapshots["peak_mb"] < MAX_MB
    _, compared = await compare(bus, forget=True)
    assert Counter(node.verdict for node in compared) == {"same": NODES}
