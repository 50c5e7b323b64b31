"""The request handlers for clients: submit, status and cancel, by the plain subjects and by a submitter's own."""

import base64
from typing import NamedTuple
from uuid import uuid4

from msgspec.structs import asdict, replace

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict, Refused
from loom.bus.natsio.stored_message import read_message
from loom.bus.natsio.transport.message import Msg
from loom.bus.records import update_record
from loom.bus.replies import allowed_reply, answer, answer_error, is_inbox
from loom.phases.sense.admission import Admission, envelope_for
from loom.phases.shared.check_pool import CheckPool
from loom.schemas.base import Undecodable, decode
from loom.schemas.envelope import Envelope, TaskRecord, TaskStatus
from loom.schemas.errors import InvalidTask, LoomError, UnknownTask
from loom.schemas.identity import PUBLIC
from loom.schemas.notices import envelope_in
from loom.schemas.task import Accepted, StatusQuery, Submission, TaskAd, TaskError, TaskResult, is_token, parse_ad

log = get_logger()

QUEUE = "sense"
CANCELLED = TaskError(code="cancelled", message="the task was cancelled")
STRANDED = TaskError(
    code="deadline_exceeded", message="the deadline passed, and the server has lost the task's messages"
)
STRANDED_S = 1.0
"""Seconds after its deadline from which a task without messages counts as stranded."""


class ClientApi:
    """Answers clients. Every replica of SENSE has one; the server hands each request to one of them."""

    def __init__(self, bus: Bus, admission: Admission, checks: CheckPool) -> None:
        self._bus = bus
        self._admission = admission
        self._checks = checks
        self._subscriptions: list[Subscription] = []

    async def open(self) -> None:
        """Begin to answer; returns once the server knows where to send requests."""
        subjects = self._bus.subjects
        for subject, handler in (
            (subjects.submit, self._submit),
            (subjects.of("status", "*"), self._status),
            (subjects.of("cancel", "*"), self._cancel),
            (subjects.of("submit", "*"), self._submit),
            (subjects.of("status", "*", "*"), self._status),
            (subjects.of("cancel", "*", "*"), self._cancel),
        ):
            self._subscriptions.append(await self._bus.connection.serve(subject, handler, queue=QUEUE))
        await self._bus.requests.flush()

    async def close(self) -> None:
        """Answer what has come in and take nothing more."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await self._bus.requests.drain(subscription)

    async def _submit(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            ad = parse_ad(msg.data)
            if ad.task_id.encode() in msg.data:  # else the id was made here, and is new
                await self._admission.check_id(ad, client.submitter)
            await check_accept(ad, self._checks)
            submission = Submission(ad=ad, submission=uuid4().hex, reply_to=client.reply if ad.wait else "")
            headers = {"traceparent": msg.headers["traceparent"]} if "traceparent" in msg.headers else {}
            await self._bus.jetstream.publish(
                self._bus.subjects.intake(client.submitter, ad.priority, ad.task_id),
                submission,
                msg_id=f"{ad.task_id}:{submission.submission}",
                headers=headers,
                within_s=5.0,
            )
        except LoomError as error:
            log.info("submission_refused", code=error.code, field=error.field, reason=error.message[:200])
            await answer_error(self._bus, client.reply, error)
            return
        if not ad.wait:
            await answer(self._bus, client.reply, Accepted(task_id=ad.task_id))

    async def _status(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            task_id = _task_of(msg)
            entry = await self._entry(task_id, client)
            if entry is not None:
                await self._end_if_stranded(entry.value)
                await answer(self._bus, client.reply, status_of(entry.value, msg.data))
            elif await self._queued(task_id, client) is not None:
                await answer(self._bus, client.reply, Accepted(task_id=task_id))
            else:
                raise _unknown(task_id)
        except LoomError as error:
            await answer_error(self._bus, client.reply, error)

    async def _entry(self, task_id: str, client: "Client") -> Entry[TaskRecord] | None:
        """Return the record of a task, if there is one.

        Raises:
            UnknownTask: It is not one of the client's.
        """
        entry = await self._admission.records.get(task_id)
        if entry is not None and not client.reaches(entry.value):
            raise _unknown(task_id)
        return entry

    async def _end_if_stranded(self, record: TaskRecord) -> None:
        """Have a task ended that is past its deadline and of which no hop is stored any more: the server lost them."""
        if record.ended or self._bus.clock.now() < record.envelope.deadline + STRANDED_S:
            return
        task_id, subjects = record.task_id, self._bus.subjects
        for hops in (subjects.later("*", task_id, "*"), subjects.task("*", "*", task_id)):
            if await read_message(self._bus.jetstream, subjects.stream("TASKS"), {"last_by_subj": hops}) is not None:
                return
        log.warning("task_stranded", task_id=task_id)
        attempt = max(record.envelope.attempt, record.claim.attempt)
        await self._tell_evaluate(replace(record.envelope, attempt=attempt), STRANDED, f"{task_id}:stranded")

    async def _cancel(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            record = await self._cancelled(_task_of(msg), client)
            if record.state == "cancelled":  # also when it was cancelled before: the first message may be lost
                await self._bus.connection.publish(self._bus.subjects.of("cancelled", record.task_id))
            await answer(self._bus, client.reply, status_of(record, msg.data))
        except LoomError as error:
            await answer_error(self._bus, client.reply, error)

    async def _cancelled(self, task_id: str, client: "Client") -> TaskRecord:
        """Cancel the task unless it has ended, and return its record.

        EVALUATE gets its message before the record changes: if this process dies in between, the task still ends.
        """
        entry = await self._entry(task_id, client)
        if entry is None:
            return await self._cancel_queued(task_id, client)
        if entry.value.ended:
            return entry.value
        current = await self._last_hop(task_id) or entry.value.envelope
        current = replace(current, record_version=None)
        attempt = max(current.attempt, entry.value.claim.attempt)
        await self._tell_evaluate(replace(current, attempt=attempt), CANCELLED, f"{task_id}:cancel")

        def cancel(record: TaskRecord) -> TaskRecord | None:
            return as_cancelled(replace(record, envelope=current), self._bus.clock.now())

        changed = await update_record(self._admission.records, task_id, cancel)
        return changed.value if changed else entry.value

    async def _last_hop(self, task_id: str) -> Envelope | None:
        """The envelope of a running task as it is on its way: with its hops and its award, so that they are kept."""
        try:
            found = await self._bus.jetstream.api(
                f"STREAM.MSG.GET.{self._bus.subjects.stream('TASKS')}",
                {"last_by_subj": self._bus.subjects.task("*", "*", task_id)},
            )
        except Refused:
            return None
        return envelope_in(base64.b64decode(found["message"].get("data", "")))

    async def _cancel_queued(self, task_id: str, client: "Client") -> TaskRecord:
        found = await self._queued(task_id, client)
        if found is None:
            raise _unknown(task_id)
        submitter, queued = found
        record = TaskRecord(
            task_id=task_id,
            state="running",
            submission=queued.submission,
            reply_to=(queued.reply_to,) if is_inbox(queued.reply_to, plain=submitter == PUBLIC) else (),
            envelope=envelope_for(queued, submitter, self._bus.clock.now(), ""),
            admitted_at=self._bus.clock.now(),
        )
        ended = as_cancelled(record, self._bus.clock.now()) or record
        try:
            await self._admission.records.create(task_id, ended)
        except Conflict:  # admitted meanwhile
            return await self._cancelled(task_id, client)
        await self._tell_evaluate(ended.envelope, CANCELLED, f"{task_id}:cancel")
        return ended

    async def _tell_evaluate(self, envelope: Envelope, error: TaskError, msg_id: str) -> None:
        subject = self._bus.subjects.task("evaluate", envelope.priority, envelope.task_id)
        await store_once(self._bus, subject, envelope.failed(error), msg_id=msg_id)

    async def _queued(self, task_id: str, client: "Client") -> tuple[str, Submission] | None:
        """The submission that waits in the intake and that the client reaches, if there is one, and its submitter."""
        stream = self._bus.subjects.stream("INTAKE")
        whose = client.submitter if client.by_name else "*"
        try:
            found = await self._bus.jetstream.api(
                f"STREAM.MSG.GET.{stream}", {"last_by_subj": self._bus.subjects.intake(whose, "*", task_id)}
            )
        except Refused:
            return None
        message = found["message"]
        parsed = self._bus.subjects.parse(message["subject"])
        submitter = parsed.tokens["submitter"] if parsed else PUBLIC
        return submitter, decode(base64.b64decode(message.get("data", "")), Submission)

    def _client(self, msg: Msg) -> "Client":
        """Return what the subject and the reply subject of a request say about its sender."""
        parsed = self._bus.subjects.parse(msg.subject)
        name = parsed.tokens.get("submitter") if parsed else None
        reply = allowed_reply(self._bus, msg.reply, plain=name is None, subject=msg.subject)
        return Client(name or PUBLIC, by_name=name is not None, reply=reply)


class Client(NamedTuple):
    """The sender of a request."""

    submitter: str
    by_name: bool
    """Whether the subject names the submitter; the plain subjects reach the tasks of all submitters."""
    reply: str
    """Where its answer goes; empty: nowhere."""

    def reaches(self, record: TaskRecord) -> bool:
        """Return whether the client may see and cancel the task of a record."""
        return not self.by_name or record.envelope.submitter == self.submitter


async def check_accept(ad: TaskAd, checks: CheckPool) -> None:
    """Return if the ad's pattern and JSON Schema can be used.

    Raises:
        InvalidTask: One of them exceeds a bound, or does not compile within its time and memory.
        NotChecked: It cannot be found out now.
    """
    fault = await checks.unsatisfiable(ad.accept) if ad.accept is not None else None
    if fault is not None:
        raise InvalidTask(fault, field="accept", task_id=ad.task_id)


def as_cancelled(record: TaskRecord, now: float) -> TaskRecord | None:
    """Return the record as cancelled at server time `now`; None when it has ended already."""
    if record.ended:
        return None
    return replace(record, state="cancelled", ended_at=now, envelope=record.envelope.failed(CANCELLED))


def status_of(record: TaskRecord, query: bytes) -> TaskResult:
    """Return what a request for the status of a task is answered.

    Args:
        query: The request's body. One that cannot be read asks for nothing: a cancel counts all the same.
    """
    try:
        full = bool(query) and decode(query, StatusQuery).full
    except Undecodable as error:
        log.info("status_query_undecodable", task_id=record.task_id, reason=error.message)
        full = False
    result = record.to_result()
    if not full:
        return result
    # An inbox is a place to send answers to, and of no concern to others.
    return TaskStatus(**asdict(result), record=replace(record, reply_to=()))


def _unknown(task_id: str) -> UnknownTask:
    return UnknownTask(f"no task {task_id} is known; records are kept for 72 hours", task_id=task_id)


def _task_of(msg: Msg) -> str:
    """The task a request names; a `*`, which the server lets pass, would stand for anybody's."""
    task_id = msg.subject.rsplit(".", 1)[1]
    if not is_token(task_id):
        raise InvalidTask("task_id must match [A-Za-z0-9_-]{1,64}", field="task_id")
    return task_id
