"""State of the tasks of one `loom run`, from the messages of the bus: phase, node and result. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loom.bus.tap import TappedMessage
from loom.schemas.auction import Award, CallForBids
from loom.schemas.envelope import Envelope, Split
from loom.schemas.events import TextDelta
from loom.schemas.identity import qualified
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import SubtaskEnded
from loom.schemas.run import Delta
from loom.schemas.task import Submission, TaskAd, TaskResult

FAMILIES = ("intake", "task", "auction", "delta", "result", "reward", "lifecycle")
"""Families of subjects that change the state."""

TAIL_CHARS = 200
"""Most characters of an unfinished answer that are kept to be shown."""

Attempt = tuple[str, int]
"""Task id and number."""


@dataclass
class Row:
    """One task."""

    ad: TaskAd
    phase: str = "waiting"
    """`waiting` (not submitted yet), a phase, or the state of an ended task."""
    node: str = ""
    """As people write it."""
    attempt: int = 1
    tail: str = ""
    """End of the answer so far."""
    parts: set[str] = field(default_factory=set)
    """Ids of its subtasks that have begun."""
    parts_ended: set[str] = field(default_factory=set)
    ended: bool = False


class RunState:
    """The tasks of a run, in the order of their file. Messages about other tasks are ignored."""

    def __init__(self, ads: Sequence[TaskAd]) -> None:
        self.rows = {ad.task_id: Row(ad) for ad in ads}
        """task id -> row. The keys never change, so that another thread may draw it."""
        self.awards: dict[Attempt, Award] = {}
        self.rewards: dict[Attempt, Reward] = {}
        self.profiles: dict[str, NodeProfile] = {}
        """Node -> what is known of it, for nodes that learned from these tasks."""
        self.domains: dict[str, str] = {}
        """domain_token -> the domain as worded."""
        self._to_learn: set[tuple[str, str]] = set()
        self._learned: set[tuple[str, str]] = set()

    @property
    def learned(self) -> bool:
        """Whether every reward of the run is part of its node's profile."""
        return self._to_learn <= self._learned

    def see(self, seen: TappedMessage) -> Row | None:
        """Apply a message; return the row whose phase, node or attempt it changed."""
        message: Any = seen.message
        if isinstance(message, Lifecycle | Reward):
            self._learn(message) if isinstance(message, Lifecycle) else self._reward(message)
            return None
        if isinstance(message, CallForBids):
            return self._call(message)
        if (part := _part_in(seen)) is not None:
            return self._part(*part)
        row = self.rows.get(seen.tokens.get("task_id", "") or str(getattr(message, "task_id", "")))
        if row is None or row.ended:
            return None
        before = (row.phase, row.node, row.attempt)
        match message:
            case Submission():
                row.phase = "sense"
            case Envelope() if seen.family == "task":
                self._move(row, seen.tokens["phase"], message)
            case Delta(event=TextDelta(text=text)) if message.attempt >= row.attempt:
                row.tail = (row.tail + text)[-TAIL_CHARS:]
            case TaskResult():
                return self.end(message)
            case _:
                pass  # other kinds of progress, and what could not be read
        return row if before != (row.phase, row.node, row.attempt) else None

    def _call(self, call: CallForBids) -> Row | None:
        """Apply a call for bids; return the row of its last task that has moved to MATCH."""
        changed = None
        for lot in call.lots:
            row = self.rows.get(lot.task_id)
            if (
                row is None
                or row.ended
                or lot.attempt < row.attempt
                or (row.phase, row.attempt) == ("match", lot.attempt)
            ):
                continue
            row.phase, row.attempt = "match", lot.attempt
            changed = row
        return changed

    def end(self, result: TaskResult) -> Row | None:
        """Apply a result from the tap or the handle; return its row unless it had ended."""
        row = self.rows[result.task_id]
        if row.ended:
            return None
        row.phase, row.ended = result.state, True
        row.node, row.attempt = result.node, max(result.attempts, 1)
        if result.success and result.node:
            self._to_learn.add((result.task_id, result.node))
        return row

    def _part(self, parent_id: str, task_id: str, ended: bool) -> Row | None:
        """Apply the start or the end of a subtask."""
        row = self.rows.get(parent_id)
        if row is None or row.ended:
            return None
        before = len(row.parts), len(row.parts_ended)
        row.parts.add(task_id)
        if ended:
            row.parts_ended.add(task_id)
        return row if before != (len(row.parts), len(row.parts_ended)) else None

    def _move(self, row: Row, phase: str, envelope: Envelope) -> None:
        if envelope.attempt < row.attempt:
            return
        if envelope.attempt > row.attempt:
            row.tail = ""
        row.phase, row.attempt = phase, envelope.attempt
        row.node = envelope.award.node if envelope.award else ""
        self.domains[envelope.domain_token] = envelope.domain
        if envelope.award is not None:
            self.awards[row.ad.task_id, envelope.attempt] = envelope.award

    def _reward(self, reward: Reward) -> None:
        if reward.task_id in self.rows:
            self.rewards[reward.task_id, reward.attempt] = reward
            self._to_learn.add((reward.task_id, reward.node))

    def _learn(self, news: Lifecycle) -> None:
        ours = [task_id for task_id in news.task_ids if task_id in self.rows]
        node = qualified(news.owner, news.node_id)
        if news.profile is not None and (ours or node in self.profiles):
            self.profiles[node] = news.profile
        self._learned.update((task_id, node) for task_id in ours)


def _part_in(seen: TappedMessage) -> tuple[str, str, bool] | None:
    """Parent and id of the subtask that a hop is about, and whether it has ended; None for any other message."""
    match seen.message:
        case SubtaskEnded() as notice:
            return notice.task_id, notice.child_id, True
        case Envelope(split=Split(parent=parent, subtask=str())) as envelope if seen.family == "task":
            return parent, envelope.task_id, False
        case _:
            return None
