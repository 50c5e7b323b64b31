"""Every subject, built and read here only. docs/subjects.md is generated from this file.

A subject is the namespace, a family, and the family's variable tokens; a token is checked when it is put in.
"""

import re
from typing import NamedTuple

from loom.schemas.errors import InvalidTask
from loom.schemas.task import is_token

_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Family(NamedTuple):
    """One row of the subject table."""

    name: str
    tokens: tuple[str, ...]
    kind: str
    body: str
    route: str


FAMILIES: tuple[Family, ...] = (
    Family("submit", (), "request", "TaskAd → TaskResult", "anyone → SENSE"),
    Family("status", ("task_id",), "request", "StatusQuery or none → TaskResult", "anyone → SENSE"),
    Family(
        "cancel", ("task_id",), "request", "StatusQuery or none → TaskResult", "anyone → SENSE, node hosts, EXECUTE"
    ),
    Family("intake", ("priority", "task_id"), "stream INTAKE", "Submission", "submit, Runtime → SENSE"),
    Family(
        "task",
        ("phase", "priority", "task_id"),
        "stream TASKS",
        "Envelope; to SCALE also SubtaskEnded, PlanTimeout, ParentEnded",
        "each phase → the next",
    ),
    Family(
        "later",
        ("phase", "task_id", "origin"),
        "stream TASKS",
        "Envelope or PlanTimeout, scheduled",
        "a phase → itself; EVALUATE → MATCH",
    ),
    Family("auction", ("domain_token",), "scatter-gather", "CallForBids → Offer", "MATCH → every node host"),
    Family(
        "run", ("host_id",), "request, streamed replies", "RunRequest → RunEvents, one or several", "EXECUTE → a host"
    ),
    Family("host", ("host_id",), "publish", "HostAnnouncement", "node hosts → MATCH, anyone"),
    Family("hosts", (), "publish", "-", "anyone → node hosts, which announce themselves"),
    Family("spawn", (), "request", "SpawnRequest → SpawnReply", "SCALE → hosts with templates"),
    Family("retire", ("host_id",), "request", "RetireRequest → RetireReply", "ADAPT → one node host"),
    Family("delta", ("task_id",), "publish", "Delta", "EXECUTE → clients, tap"),
    Family("result", ("task_id",), "publish", "TaskResult", "EVALUATE → clients, tap"),
    Family(
        "reward", ("node_id", "domain_token"), "stream REWARDS", "Reward", "EVALUATE, judges, people → ADAPT, anyone"
    ),
    Family("lifecycle", ("kind", "node_id"), "publish", "Lifecycle", "node hosts, ADAPT → anyone"),
    Family("dead", ("phase", "task_id"), "stream DEAD", "raw bytes, facts as headers", "any phase → operator"),
)
_BY_NAME = {family.name: family for family in FAMILIES}


class Parsed(NamedTuple):
    """A subject taken apart."""

    family: str
    tokens: dict[str, str]

    @property
    def task_id(self) -> str:
        """The task the subject is about; empty where it names none."""
        return self.tokens.get("task_id", "")


class Subjects:
    """The subjects of one namespace.

    Args:
        namespace: Matches `[a-z0-9][a-z0-9_-]{0,31}`; two namespaces on one server never see each other.

    Raises:
        ValueError: Not such a name.
    """

    def __init__(self, namespace: str = "loom") -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"namespace {namespace!r} must match {_NAMESPACE.pattern}")
        self.namespace = namespace
        self.everything = f"{namespace}.>"
        self.submit = f"{namespace}.submit"
        self.hosts = f"{namespace}.hosts"
        self.spawn = f"{namespace}.spawn"

    def of(self, family: str, *tokens: str) -> str:
        """Return the subject of `family` with `tokens` in the table's order; `*` stands for any.

        Raises:
            InvalidTask: A token has characters a subject must not have; `field` names it.
        """
        names = _BY_NAME[family].tokens
        for name, text in zip(names, tokens, strict=True):
            if text != "*" and not is_token(text):
                raise InvalidTask(f"{name} must match [A-Za-z0-9_-]{{1,64}}", field=name)
        return ".".join((self.namespace, family, *tokens))

    def later(self, phase: str, task_id: str, origin: str) -> str:
        """Return the subject under which a hop of `phase` that follows from the message `origin` waits."""
        return self.of("later", phase, task_id, origin)

    def task(self, phase: str, priority: str, task_id: str) -> str:
        """Return the subject of a hop to `phase`."""
        return self.of("task", phase, priority, task_id)

    def intake(self, priority: str, task_id: str) -> str:
        """Return the subject of a submission."""
        return self.of("intake", priority, task_id)

    def stream(self, name: str) -> str:
        """Return the name of a stream: `LOOM_TASKS` for `TASKS`."""
        return f"{self.namespace.upper()}_{name}"

    def bucket(self, name: str) -> str:
        """Return the name of a key-value bucket: `loom_records` for `records`."""
        return f"{self.namespace}_{name}"

    def parse(self, subject: str) -> Parsed | None:
        """Return what `subject` says, or None when it is not one of this namespace's."""
        namespace, _, rest = subject.partition(".")
        family, *tokens = rest.split(".")
        known = _BY_NAME.get(family)
        if namespace != self.namespace or known is None or len(tokens) != len(known.tokens):
            return None
        return Parsed(family, dict(zip(known.tokens, tokens, strict=True)))
