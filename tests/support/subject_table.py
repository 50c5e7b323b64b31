"""The table of subjects as it was agreed, written out once more so that a change of the code alone is noticed."""

import re
from typing import NamedTuple

TOKEN = r"[A-Za-z0-9_-]{1,64}"


class Row(NamedTuple):
    """One kind of subject."""

    pattern: str
    """What follows the namespace."""
    kind: str
    """request: answered; publish: live only; else the stream that stores it."""
    bodies: frozenset[str] = frozenset()
    """Names of the types of its messages and their answers."""


def _row(pattern: str, kind: str, bodies: str = "") -> Row:
    return Row(pattern, kind, frozenset(bodies.split()))


TABLE = (
    _row("submit", "request", "TaskAd TaskResult"),
    _row("status.<task_id>", "request", "StatusQuery TaskResult"),
    _row("cancel.<task_id>", "request", "StatusQuery TaskResult"),
    _row("from.<submitter>.submit", "request", "TaskAd TaskResult"),
    _row("from.<submitter>.status.<task_id>", "request", "StatusQuery TaskResult"),
    _row("from.<submitter>.cancel.<task_id>", "request", "StatusQuery TaskResult"),
    _row("intake.<submitter>.<priority>.<task_id>", "INTAKE", "Submission"),
    _row("task.<phase>.<priority>.<task_id>", "TASKS", "Envelope SubtaskEnded PlanTimeout ParentEnded"),
    _row("later.<phase>.<task_id>.<key>", "TASKS", "Envelope PlanTimeout"),
    _row("auction.<domain_token>", "publish", "CallForBids"),
    _row("call.<owner>.<host_id>", "publish", "CallForBids"),
    _row("offer.<owner>.<host_id>.<instance>.<call_id>", "publish", "Offer"),
    _row("run.<owner>.<host_id>", "request", "RunRequest RunEvents"),
    _row("event.<owner>.<host_id>.<instance>.<run_key>", "publish", "RunEvent"),
    _row("stop.<owner>.<host_id>", "publish", "Stop"),
    _row("cancelled.<task_id>", "publish"),
    _row("host.<owner>.<host_id>", "publish", "HostAnnouncement"),
    _row("hosts", "publish"),
    _row("spawn", "request", "SpawnRequest SpawnReply"),
    _row("retire.<owner>.<host_id>", "request", "RetireRequest RetireReply"),
    _row("delta.<submitter>.<task_id>", "publish", "Delta"),
    _row("result.<submitter>.<task_id>", "publish", "TaskResult"),
    _row("reward.<source>.<owner>.<node_id>.<domain_token>", "REWARDS", "Reward"),
    _row("lifecycle.<source>.<kind>.<owner>.<node_id>", "publish", "Lifecycle"),
    _row("subtask.<submitter>.<parent_id>", "publish", "SubtaskEvent"),
    _row("dead.<phase>.<task_id>", "DEAD"),
)
PATTERNS = frozenset(row.pattern for row in TABLE)
_EXPRESSIONS = [(row.pattern, re.compile(re.sub(r"<\w+>", TOKEN, row.pattern.replace(".", r"\.")))) for row in TABLE]


def pattern_of(subject: str, namespace: str) -> str | None:
    """Return the row that a subject belongs to; None for one outside the table, or of two rows."""
    rest = subject.removeprefix(f"{namespace}.")
    rows = [pattern for pattern, expression in _EXPRESSIONS if expression.fullmatch(rest)]
    return rows[0] if len(rows) == 1 and rest != subject else None
