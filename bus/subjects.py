"""The table of subjects, and the only code that builds and parses them. docs/subjects.md is generated from it.

A subject consists of the namespace, a family, and the family's variable tokens, which are checked when it is built.
"""

import re
from typing import NamedTuple

from loom.schemas.errors import InvalidTask
from loom.schemas.tokens import TOKEN_PATTERN, is_token

_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"<(\w+)>")


class Family(NamedTuple):
    """One row of the subject table."""

    name: str
    pattern: str
    """The tokens after the namespace; a variable token is its name in angle brackets."""
    kind: str
    body: str
    route: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of the variable tokens, in order."""
        return tuple(_VARIABLE.findall(self.pattern))


FAMILIES: tuple[Family, ...] = (
    Family("submit", "submit", "request", "TaskAd → TaskResult", "anyone → SENSE, as submitter `public`"),
    Family("status", "status.<task_id>", "request", "StatusQuery or none → TaskResult", "anyone → SENSE: any task"),
    Family("cancel", "cancel.<task_id>", "request", "StatusQuery or none → TaskResult", "anyone → SENSE: any task"),
    Family("submit", "from.<submitter>.submit", "request", "TaskAd → TaskResult", "a submitter → SENSE"),
    Family(
        "status",
        "from.<submitter>.status.<task_id>",
        "request",
        "StatusQuery or none → TaskResult",
        "a submitter → SENSE: its own tasks",
    ),
    Family(
        "cancel",
        "from.<submitter>.cancel.<task_id>",
        "request",
        "StatusQuery or none → TaskResult",
        "a submitter → SENSE: its own tasks",
    ),
    Family(
        "intake",
        "intake.<submitter>.<priority>.<task_id>",
        "stream INTAKE",
        "Submission",
        "SENSE's submit handler, Runtime → SENSE",
    ),
    Family(
        "task",
        "task.<phase>.<priority>.<task_id>",
        "stream TASKS",
        "Envelope; to SCALE also SubtaskEnded, PlanTimeout, ParentEnded",
        "each phase → the next",
    ),
    Family(
        "later",
        "later.<phase>.<task_id>.<key>",
        "stream TASKS",
        "Envelope or PlanTimeout, scheduled",
        "a phase → itself; EVALUATE → MATCH",
    ),
    Family("auction", "auction.<domain_token>", "publish", "CallForBids", "MATCH → every node host"),
    Family("call", "call.<owner>.<host_id>", "publish", "CallForBids", "MATCH → one node host"),
    Family(
        "offer",
        "offer.<owner>.<host_id>.<instance>.<call_id>",
        "publish",
        "Offer",
        "a node host → the MATCH replica that called",
    ),
    Family(
        "run",
        "run.<owner>.<host_id>",
        "request, replies on `loom.event.…`",
        "RunRequest → RunEvents, one or several",
        "EXECUTE → one node host",
    ),
    Family(
        "event",
        "event.<owner>.<host_id>.<instance>.<run_key>",
        "publish",
        "RunEvent, or several; from a plain node any body, once",
        "a node host → the EXECUTE replica that asked",
    ),
    Family("stop", "stop.<owner>.<host_id>", "publish", "Stop", "EXECUTE → one node host"),
    Family("cancelled", "cancelled.<task_id>", "publish", "-", "SENSE, EVALUATE → EXECUTE"),
    Family("host", "host.<owner>.<host_id>", "publish", "HostAnnouncement", "node hosts → MATCH, ADAPT, anyone"),
    Family("hosts", "hosts", "publish", "-", "anyone → node hosts, which announce themselves"),
    Family("spawn", "spawn", "request", "SpawnRequest → SpawnReply", "SCALE → node hosts that can start nodes"),
    Family("retire", "retire.<owner>.<host_id>", "request", "RetireRequest → RetireReply", "ADAPT → one node host"),
    Family("delta", "delta.<submitter>.<task_id>", "publish", "Delta", "EXECUTE → clients, tap"),
    Family("result", "result.<submitter>.<task_id>", "publish", "TaskResult", "EVALUATE → clients, tap"),
    Family(
        "reward",
        "reward.<source>.<owner>.<node_id>.<domain_token>",
        "stream REWARDS",
        "Reward",
        "EVALUATE, judges, people → ADAPT, anyone",
    ),
    Family(
        "lifecycle",
        "lifecycle.<source>.<kind>.<owner>.<node_id>",
        "publish",
        "Lifecycle",
        "node hosts (the source is their owner), ADAPT → anyone",
    ),
    Family("subtask", "subtask.<submitter>.<parent_id>", "publish", "SubtaskEvent", "SCALE → clients, page"),
    Family("dead", "dead.<phase>.<task_id>", "stream DEAD", "raw bytes, facts as headers", "any phase → operator"),
)
_TOKENS = {(row.name, len(row.tokens)): row.tokens for row in FAMILIES}
_TEMPLATES = {(row.name, len(row.tokens)): "%s." + _VARIABLE.sub("%s", row.pattern) for row in FAMILIES}
_ANY_TOKEN = rf"(?:{TOKEN_PATTERN}|\*)"
_JOINED = [re.compile(r"\.".join([_ANY_TOKEN] * count) + r"\Z") for count in range(7)]
"""Number of tokens -> pattern of the joined tokens: one match costs less than one match per token."""
_BY_LENGTH: dict[tuple[str, int], list[tuple[str, list[str]]]] = {}
"""(first token, number of tokens) -> name and tokens of each row that such a subject may belong to."""
for _row in FAMILIES:
    _parts = _row.pattern.split(".")
    _BY_LENGTH.setdefault((_parts[0], len(_parts)), []).append((_row.name, _parts))


class Parsed(NamedTuple):
    """The family and the variable tokens of a subject."""

    family: str
    tokens: dict[str, str]

    @property
    def task_id(self) -> str:
        """The id of the task, or of the parent task; empty if the subject has neither."""
        return self.tokens.get("task_id") or self.tokens.get("parent_id", "")


class Subjects:
    """Builds and parses the subjects of one namespace.

    Args:
        namespace: Matches `[a-z0-9][a-z0-9_-]{0,31}`; namespaces on one server are isolated from each other.

    Raises:
        ValueError: `namespace` does not match.
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
        """Return the subject of `family` with `tokens` in the order of the table.

        If a family has two rows, the number of tokens selects one: `of("status", task_id)` is the plain subject,
        `of("status", submitter, task_id)` the subject of a submitter.

        Args:
            tokens: Values of the variable tokens; `*` is the wildcard.

        Raises:
            InvalidTask: A token contains characters that are not allowed; `field` names it.
        """
        row = family, len(tokens)
        if not _JOINED[len(tokens)].match(".".join(tokens)):
            name = next(
                name for name, text in zip(_TOKENS[row], tokens, strict=True) if text != "*" and not is_token(text)
            )
            raise InvalidTask(f"{name} must match {TOKEN_PATTERN}", field=name)
        return _TEMPLATES[row] % (self.namespace, *tokens)

    def later(self, phase: str, task_id: str, key: str) -> str:
        """Return the subject of a message that `phase` schedules."""
        return self.of("later", phase, task_id, key)

    def task(self, phase: str, priority: str, task_id: str) -> str:
        """Return the subject of a hop to `phase`."""
        return self.of("task", phase, priority, task_id)

    def intake(self, submitter: str, priority: str, task_id: str) -> str:
        """Return the subject of a submission."""
        return self.of("intake", submitter, priority, task_id)

    def stream(self, name: str) -> str:
        """Return the name of a stream: `LOOM_TASKS` for `TASKS`."""
        return f"{self.namespace.upper()}_{name}"

    def bucket(self, name: str) -> str:
        """Return the name of a key-value bucket: `loom_records` for `records`."""
        return f"{self.namespace}_{name}"

    def parse(self, subject: str) -> Parsed | None:
        """Return family and tokens of a subject; None if it is not in the table, or in another namespace."""
        namespace, *tokens = subject.split(".")
        if namespace != self.namespace or not tokens:
            return None
        for family, pattern in _BY_LENGTH.get((tokens[0], len(tokens)), ()):
            pairs = list(zip(pattern, tokens, strict=True))
            if all(name == token for name, token in pairs if name[0] != "<"):
                return Parsed(family, {name[1:-1]: token for name, token in pairs if name[0] == "<"})
        return None
