"""Sense: find out how hard a task is, which domain it belongs to, and whether it is to be divided.

Consumes   intake.<submitter>.<priority>.*   submissions, one lane per priority; task.sense.*.* for subtasks
Answers    submit, status.*, cancel.*, and the same of one submitter below from.<submitter>
Publishes  task.match            the admitted envelope with its spec
State      task records: created here, and only here for tasks that are well; calibrations are read, never written
Gives up   an ad that breaks a rule fails with invalid_task; a late one with deadline_exceeded
"""

import asyncio
import time

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery, Slots
from loom.bus.hops.health import Health, together
from loom.bus.hops.hop_loop import HopLoop, Service, lane_slots
from loom.bus.hops.orphans import sweep
from loom.bus.hops.outcomes import Dead, Done, Fail, Next, Outcome
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.topology import INTAKE_LANES, SENSE_LANE, Lane, in_flight, stream_state
from loom.phases.sense.admission import Admission, envelope_for
from loom.phases.sense.calibration_reader import Calibrations
from loom.phases.sense.client_api import CANCELLED, ClientApi, check_accept
from loom.phases.sense.estimate import estimate_schema, estimate_task, prompt, read_estimate, with_division
from loom.phases.shared.check_pool import CheckPool, NotChecked
from loom.phases.shared.llm_call import call_llm
from loom.phases.shared.token_usage import budget_before_run, with_phase_usage
from loom.schemas.base import MAX_AD_BYTES
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.errors import InvalidTask, LoomError
from loom.schemas.identity import PUBLIC
from loom.schemas.llm import CompletionParams, LLMProvider, UserMessage
from loom.schemas.task import Submission, TaskAd, TaskError, check_ad

log = get_logger()

ASK_WITHIN_S = 10.0  # a model that takes longer is not worth waiting for: the heuristic stands in
ESTIMATE_TOKENS = 128
MAX_SUBMISSION_BYTES = MAX_AD_BYTES + 1024
"""An ad at its limit, with id and reply subject: a longer message is refused before its parts are looked at."""
TOO_LARGE = TaskError(code="invalid_task", message=f"the ad is more than {MAX_AD_BYTES} bytes", field="description")
GATE_S = 0.05
EXACT_FROM = 0.5
"""Share of the room in flight from which it matters that not every stored message is work in flight."""
IDLE_S = 0.5
"""How long the count of parked and settled messages is good for: it takes a request to each consumer."""
RESERVED = 0.2  # share of the room in flight kept for high and critical


class Sense:
    """The first phase."""

    def __init__(self, bus: Bus, config: ClusterConfig, llm: LLMProvider | None = None) -> None:
        self._bus = bus
        self._config = config
        self._llm = llm
        self._admission = Admission(bus)
        self._checks = CheckPool(bus)
        self._desk = ClientApi(bus, self._admission, self._checks)
        self._calibrations = Calibrations(bus)
        self._room = config.max_in_flight
        self._idle = 0
        """Messages in TASKS that are no work in flight: parked until their time, or settled and kept by the server."""
        self._idle_until = 0.0
        self._slots: dict[str, Slots] = {}
        """The slots of each lane of the intake."""
        self._begun = 0
        """Submissions taken in hand so far."""
        self._gate: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        intake = [(lane, lane_slots(lane)) for lane in INTAKE_LANES]
        self._intake = HopLoop(bus, Service("sense", intake, Submission, self.admit, window=self._window))
        self._subtasks = HopLoop(bus, Service("sense", [(SENSE_LANE, 64)], Envelope, self.admit_subtask))

    def health(self) -> Health:
        """Return how far the work has got."""
        return together([self._intake.health(), self._subtasks.health()])

    async def start(self) -> None:
        """Begin to answer and to admit."""
        await self._measure_room()  # a restarted replica may meet a full house
        await self._calibrations.start()
        await self._intake.start()
        await self._subtasks.start()
        await self._desk.open()
        self._gate = self._bus.tasks.spawn(self._watch_room(), name="intake gate", essential=True)
        self._sweeping = self._bus.tasks.spawn(sweep(self._bus), name="sweep orphans")

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._desk.close()
        await asyncio.gather(self._intake.drain(timeout_s), self._subtasks.drain(timeout_s))
        await self._calibrations.stop()
        for task in (self._gate, self._sweeping):
            if task is not None:
                task.cancel()

    async def admit(self, submission: Submission, delivery: Delivery) -> Outcome:
        """Admit a submission once and say how hard it is."""
        ad = submission.ad
        if not delivery.subject.endswith(f".{ad.task_id}"):
            return Dead("the subject names another task than the ad")
        self._room -= 1
        self._begun += 1
        parsed = self._bus.subjects.parse(delivery.subject)
        submitter = parsed.tokens["submitter"] if parsed else PUBLIC
        trace = delivery.msg.headers.get("traceparent", "")
        envelope = envelope_for(submission, submitter, delivery.facts.stored_at, trace)
        admitted = await self._admission.admit(envelope, submission.submission, submission.reply_to)
        if admitted is None:
            return Done()
        if len(delivery.msg.data) > MAX_SUBMISSION_BYTES:
            return Fail(TOO_LARGE, admitted)
        try:
            check_ad(ad)
            await self._check_accept(ad)
        except InvalidTask as error:
            return Fail(TaskError.of(error), admitted)
        return await self._sensed(admitted)

    async def _check_accept(self, ad: TaskAd) -> None:
        try:
            await check_accept(ad, self._checks)
        except NotChecked as error:
            log.warning("accept_not_checked", reason=error.message)  # EVALUATE checks it with the result

    async def admit_subtask(self, envelope: Envelope, _delivery: Delivery) -> Outcome:
        """Admit a part of another task; one whose parent has ended ends at once."""
        split = envelope.split
        if split is None:
            return Dead("neither a submission nor a subtask")
        admitted = await self._admission.admit(envelope, f"of-{split.parent}"[:64])
        if admitted is None:
            return Done()
        # The parent's record is read after the child's is written: whoever ends the parent sees one of them.
        parent = await self._admission.records.get(split.parent)
        if parent is None or parent.value.ended:
            return Fail(CANCELLED, admitted)
        try:
            await self._check_accept(admitted.ad)  # a delegated ad has been through no desk
        except InvalidTask as error:
            return Fail(TaskError.of(error), admitted)
        return await self._sensed(admitted)

    async def _sensed(self, envelope: Envelope) -> Outcome:
        left_s = envelope.deadline - self._bus.clock.now()
        if left_s <= 0:
            return Fail(
                TaskError(code="deadline_exceeded", message="the deadline passed before the task began"), envelope
            )
        envelope, spec = await self._with_spec(envelope, left_s)
        if envelope.ad.estimated_complexity is None:
            spec = self._calibrations.apply(spec)
        spec = with_division(spec, envelope.ad, envelope.depth, self._config)
        return Next("match", replace(envelope, spec=spec))

    async def _with_spec(self, envelope: Envelope, left_s: float) -> tuple[Envelope, Spec]:
        """Return how hard the task is, and the envelope with what finding out took."""
        spec, unsure = estimate_task(envelope.ad)
        if not unsure or self._llm is None:
            return envelope, spec
        params = CompletionParams(
            messages=(UserMessage(prompt(envelope.ad)),),
            temperature=0.0,
            max_tokens=ESTIMATE_TOKENS,
            json_schema=estimate_schema(),
        )
        within_s, budget = min(left_s, ASK_WITHIN_S), budget_before_run(envelope)
        answer = await call_llm(self._llm, params, read_estimate, within_s=within_s, budget=budget)
        envelope, estimate = with_phase_usage(envelope, "sense", answer.usage), answer.value
        if estimate is None:
            return envelope, replace(spec, note=f"the model could not be asked: {answer.why}")
        given = envelope.ad.estimated_complexity
        complexity = estimate.complexity if given is None else given
        return envelope, Spec(complexity=complexity, domains=estimate.domains, method="llm")

    def _window(self, lane: Lane, slots: Slots) -> int:
        """How many submissions may still enter: no more than there is room for in flight."""
        self._slots[lane.name] = slots
        urgent = lane.name.endswith(("high", "critical"))
        room = self._room if urgent else self._room - int(self._config.max_in_flight * RESERVED)
        return min(slots.free, room)

    async def _watch_room(self) -> None:
        """Measure the room in flight again whenever it may have changed."""
        while True:
            await asyncio.sleep(GATE_S)
            if self._room < self._config.max_in_flight:
                await self._measure_room()
                self._intake.top_up()

    async def _measure_room(self) -> None:
        in_hand, begun = sum(slots.taken for slots in self._slots.values()), self._begun
        try:
            stored = (await stream_state(self._bus, "TASKS"))["messages"]
            if stored <= self._config.max_in_flight * EXACT_FROM:
                self._idle, self._idle_until = 0, 0.0
            elif time.monotonic() >= self._idle_until:
                self._idle = max(0, stored - await in_flight(self._bus))
                self._idle_until = time.monotonic() + IDLE_S
        except (LoomError, LookupError, TypeError) as error:  # the latter: an answer of another shape
            log.warning("room_unknown", **error_fields(error))
        else:
            in_hand += self._begun - begun  # on their way into TASKS, and not seen there yet
            self._room = self._config.max_in_flight - max(0, stored - self._idle) - in_hand
