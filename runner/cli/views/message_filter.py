"""Selects the messages that `loom tap` prints. No I/O."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from loom.bus.tap import TappedMessage
from loom.runner.cli.views.tables import short
from loom.schemas.auction import CallForBids, HostAnnouncement
from loom.schemas.envelope import Envelope
from loom.schemas.events import SubtaskEvent
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.notices import PlanTimeout
from loom.schemas.task import Submission, TaskAd
from loom.schemas.tokens import domain_token

REMEMBERED = 100_000
"""Tasks remembered to be a node's or a domain's; the oldest are forgotten first."""

PHASE_OF_FAMILY = {
    "submit": "sense",
    "status": "sense",
    "cancel": "sense",
    "intake": "sense",
    "auction": "match",
    "call": "match",
    "offer": "match",
    "spawn": "scale",
    "subtask": "scale",
    "run": "execute",
    "event": "execute",
    "stop": "execute",
    "cancelled": "execute",
    "delta": "execute",
    "result": "evaluate",
    "reward": "evaluate",
    "retire": "adapt",
}
"""Family -> the phase that receives it first, or publishes it; subjects of tasks and dead letters name theirs."""


Ours = OrderedDict[str, None]
"""Ids of tasks, the least recently seen first."""


PROBE = "probe-"
"""Beginning of the task ids that clients ask for to learn whether phases answer."""


@dataclass
class MessageFilter:
    """Passes the messages that match every field; an empty field matches all.

    A delta names neither node nor domain: it passes when the previous message of its task that names one has passed.
    The subtasks of a task, and theirs, pass with it from their first message on.
    """

    routine: bool = True
    """Whether heartbeats of hosts, requests for them and status probes pass."""
    task: str = ""
    phase: str = ""
    node: str = ""
    domain_token: str = ""
    _of_node: Ours = field(default_factory=Ours)
    _of_slug: Ours = field(default_factory=Ours)
    _kin: Ours = field(default_factory=Ours)

    def passes(self, seen: TappedMessage) -> bool:
        """Return whether the message passes, and remember the subtasks, nodes and domains it names."""
        if not self.routine and is_routine(seen):
            return False
        tasks = tasks_of(seen)
        node = _fits(self.node, nodes_of(seen), tasks, self._of_node)
        domain = _fits(self.domain_token, slugs_of(seen), tasks, self._of_slug)
        if isinstance(seen.message, Envelope):
            self.remember_subtask(seen.message)
        task = not self.task or any(self._is_ours(each) for each in tasks)
        return node and domain and task and (not self.phase or self.phase == phase_of(seen))

    def remember_subtask(self, envelope: Envelope) -> None:
        """Remember a subtask of the selected task, so that its messages pass."""
        if self.task and envelope.split is not None and self._is_ours(envelope.split.parent):
            _remember(self._kin, envelope.task_id)

    def _is_ours(self, task_id: str) -> bool:
        return self.task in {task_id, short(task_id)} or task_id in self._kin


def is_routine(seen: TappedMessage) -> bool:
    """Return whether a message repeats although no work is done: a heartbeat, a request for one, or a probe."""
    if seen.family == "status":
        return seen.tokens.get("task_id", "").startswith(PROBE)
    return seen.family in {"host", "hosts"}


def _fits(wish: str, named: set[str], tasks: tuple[str, ...], ours: Ours) -> bool:
    if not wish:
        return True
    if not named:
        return any(task in ours for task in tasks)
    if len(tasks) == 1:
        ours.pop(tasks[0], None)
        if wish in named:
            _remember(ours, tasks[0])
    return wish in named


def _remember(ours: Ours, task_id: str) -> None:
    ours.pop(task_id, None)
    ours[task_id] = None
    if len(ours) > REMEMBERED:
        ours.popitem(last=False)


def tasks_of(seen: TappedMessage) -> tuple[str, ...]:
    """Return the tasks a message is about."""
    message: Any = seen.message
    if isinstance(message, Lifecycle):
        return message.task_ids
    if isinstance(message, SubtaskEvent):
        return message.parent_id, message.child_id
    if isinstance(message, CallForBids):
        return tuple(lot.task_id for lot in message.lots)
    task_id = seen.tokens.get("task_id") or getattr(message, "task_id", None)
    return (task_id,) if task_id else ()


def nodes_of(seen: TappedMessage) -> set[str]:
    """Return the nodes a message names as those it is about, as people write them; losers of an auction are not."""
    match seen.message:
        case Envelope(award=award) | PlanTimeout(envelope=Envelope(award=award)):
            return {award.node} if award else set()
        case HostAnnouncement() as host:
            return {qualified(seen.tokens.get("owner", LOCAL_OWNER), node_id) for node_id in host.node_ids}
        case message:
            node_id = seen.tokens.get("node_id") or getattr(message, "node_id", None)
            owner = seen.tokens.get("owner") or getattr(message, "owner", None)
            return {qualified(owner or LOCAL_OWNER, node_id)} if node_id else set()


def slugs_of(seen: TappedMessage) -> set[str]:
    """Return the domains a message names, as tokens; one that SENSE has not judged yet may name none."""
    match seen.message:
        case Envelope() as envelope:
            return {envelope.domain_token} if envelope.spec or envelope.ad.domain else set()
        case Lifecycle(profile=NodeProfile(domains=domains)):
            return set(domains)
        case Submission(ad=TaskAd(domain=domain)):
            pass
        case message:
            domain = getattr(message, "domain", "")
            token = seen.tokens.get("domain_token") or getattr(message, "domain_token", "")
            if token:
                return {token}
    return {domain_token(domain)} if domain else set()


def phase_of(seen: TappedMessage) -> str:
    """Return the phase a message goes to, or comes from where it goes to none."""
    if seen.family == "lifecycle":
        return "adapt" if seen.tokens.get("kind") == "learned" else ""
    return seen.tokens.get("phase") or PHASE_OF_FAMILY.get(seen.family, "")
