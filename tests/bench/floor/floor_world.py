"""The input of the programs of the floor: hosts, message pattern and message sizes."""

from typing import Literal

import msgspec

Pattern = Literal["full", "reduced"]
"""`full`: each task passes all phases and has a call, a run's events, deltas and a subscription of its own. `reduced`:
SCALE is left out, tasks share calls, a run has one event and one delta, and a submitter has one subscription."""


class MessageSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the payload of each message of a task."""

    submission: int = 779
    record_created: int = 939
    match: int = 1105
    call: int = 857
    offer: int = 106
    scale: int = 1815
    execute: int = 1930
    record_claimed: int = 2089
    run: int = 819
    run_accepted: int = 27
    run_ended: int = 349
    delta: int = 118
    evaluate: int = 2247
    record_ended: int = 2334
    reward: int = 332
    result: int = 282
    profile: int = 392
    lifecycle: int = 530


class FloorWorld(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts, the failures and the messages of a floor."""

    pattern: Pattern
    hosts: tuple[str, ...]
    nodes_each: int
    fail_every: int
    """Every so many runs of a process of EVALUATE one counts as failed; 0: none."""
    sizes: MessageSizes
