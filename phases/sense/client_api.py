"""The request handlers for clients: submit, status and cancel, on the plain subjects and on those of a submitter."""

from typing import NamedTuple
from uuid import uuid4

from msgspec.structs import asdict, replace

from loom.bus.bus import Bus
from loom.bus.hops.duplicates import store_once
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.server_errors import Conflict, Refused
from loom.bus.natsio.stored_message import StoredMessage, last_message
from loom.bus.natsio.transport.message import Msg
from loom.bus.replies import allowed_reply, is_inbox, send_error, send_reply
from loom.phases.sense.admission import Admission, envelope_for
from loom.phases.shared.check_pool import CheckPool
from loom.schemas.base import Undecodable, decode
from loom.schemas.checks.ad import parse_ad
from loom.schemas.envelope import Envelope
from loom.schemas.errors import InvalidTask, LoomError, UnknownTask
from loom.schemas.identity import PUBLIC
from loom.schemas.notices import envelope_in
from loom.schemas.record import TaskRecord, TaskStatus
from loom.schemas.task import Accepted, StatusQuery, Submission, TaskAd, TaskError, TaskResult
from loom.schemas.tokens import is_token

log = get_logger()

QUEUE = "sense"
CANCELLED = TaskError(code="cancelled", message="the task was cancelled")
STRANDED = TaskError(
    code="deadline_exceeded", message="the deadline passed, and the server has lost the task's messages"
)


class ClientApi:
    """Answers requests of clients. Every replica of SENSE has one, and the server picks one for each request.

    Args:
        bus: A connected bus.
        admission: Creates and reads the records of tasks.
        checks: Checks the acceptance criteria of ads.
        stranded_after_s: Seconds after its deadline from which a task without messages counts as stranded.
    """

    def __init__(self, bus: Bus, admission: Admission, checks: CheckPool, *, stranded_after_s: float) -> None:
        self._bus = bus
        self._stranded_after_s = stranded_after_s
        self._admission = admission
        self._checks = checks
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        """Subscribe; return once the server has the subscriptions."""
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

    async def stop(self) -> None:
        """Answer the requests that have arrived, and unsubscribe."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await self._bus.requests.drain(subscription)

    async def _submit(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            ad = parse_ad(msg.data)
            if ad.task_id.encode() in msg.data:  # otherwise the id was generated here
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
            await send_error(self._bus, client.reply, error)
            return
        if not ad.wait:
            await send_reply(self._bus, client.reply, Accepted(task_id=ad.task_id))

    async def _status(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            task_id = _task_id_of(msg)
            entry = await self._get_record(task_id, client)
            if entry is not None:
                await self._end_if_stranded(entry.value)
                await send_reply(self._bus, client.reply, status_of(entry.value, msg.data))
            elif await self._queued_submission(task_id, client) is not None:
                await send_reply(self._bus, client.reply, Accepted(task_id=task_id))
            else:
                raise _unknown(task_id)
        except LoomError as error:
            await send_error(self._bus, client.reply, error)

    async def _get_record(self, task_id: str, client: "Client") -> Entry[TaskRecord] | None:
        """Return the record of a task; None without one.

        Raises:
            UnknownTask: The client may not access the task.
        """
        entry = await self._admission.records.get(task_id)
        if entry is not None and not client.may_access(entry.value):
            raise _unknown(task_id)
        return entry

    async def _end_if_stranded(self, record: TaskRecord) -> None:
        """End a task past its deadline whose messages the server has lost."""
        if record.ended or self._bus.clock.now() < record.envelope.deadline + self._stranded_after_s:
            return
        task_id, subjects = record.task_id, self._bus.subjects
        for hops in (subjects.later("*", task_id, "*"), subjects.task("*", "*", task_id)):
            if await last_message(self._bus.jetstream, subjects.stream("TASKS"), hops) is not None:
                return
        log.warning("task_stranded", task_id=task_id)
        attempt = max(record.envelope.attempt, record.claim.attempt)
        await self._publish_to_evaluate(replace(record.envelope, attempt=attempt), STRANDED, f"{task_id}:stranded")

    async def _cancel(self, msg: Msg) -> None:
        client = self._client(msg)
        try:
            record = await self._cancel_task(_task_id_of(msg), client)
            if record.state == "cancelled":  # again for a repeated cancel: the first message may be lost
                await self._bus.connection.publish(self._bus.subjects.of("cancelled", record.task_id))
            await send_reply(self._bus, client.reply, status_of(record, msg.data))
        except LoomError as error:
            await send_error(self._bus, client.reply, error)

    async def _cancel_task(self, task_id: str, client: "Client") -> TaskRecord:
        """Cancel the task unless it has ended, and return its record.

        EVALUATE gets its message before the record changes, so that the task ends even if this process dies in between.
        """
        entry = await self._get_record(task_id, client)
        if entry is None:
            return await self._cancel_queued(task_id, client)
        if entry.value.ended:
            return entry.value
        current = await self._last_hop(task_id) or entry.value.envelope
        current = replace(current, record_version=None)
        attempt = max(current.attempt, entry.value.claim.attempt)
        await self._publish_to_evaluate(replace(current, attempt=attempt), CANCELLED, f"{task_id}:cancel")

        def cancel(record: TaskRecord) -> TaskRecord | None:
            return as_cancelled(replace(record, envelope=current), self._bus.clock.now())

        changed = await self._admission.records.update_with(task_id, cancel)
        return changed.value if changed else entry.value

    async def _last_hop(self, task_id: str) -> Envelope | None:
        """Return the latest stored envelope of a running task, with its hops and its award; None without one."""
        hop = await self._last_message("TASKS", self._bus.subjects.task("*", "*", task_id))
        return None if hop is None else envelope_in(hop.data)

    async def _last_message(self, stream: str, subject: str) -> StoredMessage | None:
        try:
            return await last_message(self._bus.jetstream, self._bus.subjects.stream(stream), subject)
        except Refused:
            return None

    async def _cancel_queued(self, task_id: str, client: "Client") -> TaskRecord:
        queued_submission = await self._queued_submission(task_id, client)
        if queued_submission is None:
            raise _unknown(task_id)
        submitter, queued = queued_submission
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
            return await self._cancel_task(task_id, client)
        await self._publish_to_evaluate(ended.envelope, CANCELLED, f"{task_id}:cancel")
        return ended

    async def _publish_to_evaluate(self, envelope: Envelope, error: TaskError, msg_id: str) -> None:
        subject = self._bus.subjects.task("evaluate", envelope.priority, envelope.task_id)
        await store_once(self._bus, subject, envelope.failed(error), msg_id=msg_id)

    async def _queued_submission(self, task_id: str, client: "Client") -> tuple[str, Submission] | None:
        """Return (submitter, submission) of a queued task that the client may access; None without one."""
        submitter = client.submitter if client.by_name else "*"
        message = await self._last_message("INTAKE", self._bus.subjects.intake(submitter, "*", task_id))
        if message is None:
            return None
        parsed = self._bus.subjects.parse(message.subject)
        return parsed.tokens["submitter"] if parsed else PUBLIC, decode(message.data, Submission)

    def _client(self, msg: Msg) -> "Client":
        """Return the sender of a request, by its subject and its reply subject."""
        parsed = self._bus.subjects.parse(msg.subject)
        name = parsed.tokens.get("submitter") if parsed else None
        reply = allowed_reply(self._bus, msg.reply, plain=name is None, subject=msg.subject)
        return Client(name or PUBLIC, by_name=name is not None, reply=reply)


class Client(NamedTuple):
    """The sender of a request."""

    submitter: str
    by_name: bool
    """Whether the subject names the submitter; the plain subjects give access to the tasks of all submitters."""
    reply: str
    """Subject for the answer; empty: none."""

    def may_access(self, record: TaskRecord) -> bool:
        """Return whether the client may read and cancel the task of a record."""
        return not self.by_name or record.envelope.submitter == self.submitter


async def check_accept(ad: TaskAd, checks: CheckPool) -> None:
    """Raise unless the ad's pattern and JSON Schema are usable.

    Raises:
        InvalidTask: One of them exceeds a bound, or does not compile within its time and memory.
        NotChecked: The check cannot be made now.
    """
    fault = await checks.unsatisfiable(ad.accept) if ad.accept is not None else None
    if fault is not None:
        raise InvalidTask(fault, field="accept", task_id=ad.task_id)


def as_cancelled(record: TaskRecord, now: float) -> TaskRecord | None:
    """Return the record as cancelled at server time `now`; None if it has ended already."""
    if record.ended:
        return None
    return replace(record, state="cancelled", ended_at=now, envelope=record.envelope.failed(CANCELLED))


def status_of(record: TaskRecord, query: bytes) -> TaskResult:
    """Return the answer to a status request.

    Args:
        query: The body of the request. An undecodable body counts as empty, so that a cancel is never refused for it.
    """
    try:
        full = bool(query) and decode(query, StatusQuery).full
    except Undecodable as error:
        log.info("status_query_undecodable", task_id=record.task_id, reason=error.message)
        full = False
    result = record.to_result()
    if not full:
        return result
    # Reply subjects are private to their clients.
    return TaskStatus(**asdict(result), record=replace(record, reply_to=()))


def _unknown(task_id: str) -> UnknownTask:
    return UnknownTask(f"no task {task_id} is known; records are kept for 72 hours", task_id=task_id)


def _task_id_of(msg: Msg) -> str:
    """Return the task id in the subject of a request; `*`, which the server permits, is refused."""
    task_id = msg.subject.rsplit(".", 1)[1]
    if not is_token(task_id):
        raise InvalidTask("task_id must match [A-Za-z0-9_-]{1,64}", field="task_id")
    return task_id
