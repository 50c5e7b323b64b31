"""Sense: estimate the complexity and the domain of a task, and decide whether it is divided.

Consumes   intake.<submitter>.<priority>.*   submissions, one lane per priority; task.sense.*.* for subtasks
Answers    submit, status.*, cancel.*, and the same of one submitter below from.<submitter>
Publishes  task.match            the admitted envelope with its spec
State      task records: created here for all valid tasks; calibrations are read, never written
Gives up   an ad that breaks a rule fails with invalid_task; a late one with deadline_exceeded
"""

import asyncio
import time

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery, Slots
from loom.bus.hops.health import Health, merged_health
from loom.bus.hops.hop_loop import HopLoop, Service, lane_slots
from loom.bus.hops.orphans import sweep
from loom.bus.hops.outcomes import Dead, Done, Fail, Next, Outcome
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.topology import INTAKE_LANES, SENSE_LANE, Lane, in_flight, stream_state
from loom.phases.sense.admission import Admission, envelope_for
from loom.phases.sense.calibration_reader import CalibrationReader
from loom.phases.sense.client_api import CANCELLED, ClientApi, check_accept
from loom.phases.sense.estimate import estimate_schema, estimate_task, prompt, read_estimate, with_division
from loom.phases.sense.timings import SenseTimings
from loom.phases.shared.check_pool import CheckPool, NotChecked
from loom.phases.shared.llm_call import call_llm
from loom.phases.shared.token_usage import budget_before_run, with_phase_usage
from loom.schemas.base import MAX_AD_BYTES
from loom.schemas.checks.ad import check_decoded_ad
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.errors import InvalidTask, LoomError
from loom.schemas.identity import PUBLIC
from loom.schemas.llm import CompletionParams, LLMProvider, UserMessage
from loom.schemas.task import Submission, TaskAd, TaskError

log = get_logger()

ESTIMATE_TOKENS = 128
MAX_SUBMISSION_BYTES = MAX_AD_BYTES + 1024
"""Size of an ad at its limit, with submission id and reply subject; longer messages are not decoded further."""
TOO_LARGE = TaskError(code="invalid_task", message=f"the ad is more than {MAX_AD_BYTES} bytes", field="description")
CAPACITY_EVERY_S = 0.05
EXACT_COUNT_FROM = 0.5
"""Share of the capacity from which stored messages are distinguished from tasks in flight."""
IDLE_COUNT_TTL_S = 0.5
"""Seconds for which the count of idle messages is cached; a count takes a request to each consumer."""
URGENT_SHARE = 0.2  # share of the capacity that is reserved for priorities high and critical


class Sense:
    """The SENSE service: admits submissions and subtasks, estimates them, and answers requests of clients.

    Submissions enter while the number of tasks in flight is below `max_in_flight`; a share is reserved for urgent ones.

    Args:
        bus: A connected bus.
        config: Limits of admission and of division.
        llm: The model that estimates tasks; None: the heuristic alone.
        timings: Limits of time.
    """

    def __init__(
        self,
        bus: Bus,
        config: ClusterConfig,
        llm: LLMProvider | None = None,
        *,
        timings: SenseTimings = SenseTimings(),
    ) -> None:
        self._bus = bus
        self._timings = timings
        self._config = config
        self._llm = llm
        self._admission = Admission(bus)
        self._checks = CheckPool(bus)
        self._client_api = ClientApi(bus, self._admission, self._checks, stranded_after_s=timings.stranded_after_s)
        self._calibrations = CalibrationReader(bus)
        self._capacity = config.max_in_flight
        self._idle_messages = 0
        """Messages in TASKS that are not in flight: parked until a time, or acked but not deleted yet."""
        self._idle_expires_at = 0.0
        self._admissions = 0
        """Number of submissions handled since the start."""
        self._capacity_task: asyncio.Task[None] | None = None
        self._sweep_task: asyncio.Task[None] | None = None
        intake = [(lane, lane_slots(lane)) for lane in INTAKE_LANES]
        self._intake = HopLoop(bus, Service("sense", intake, Submission, self.admit, window=self._window))
        self._subtasks = HopLoop(bus, Service("sense", [(SENSE_LANE, 64)], Envelope, self.admit_subtask))

    def health(self) -> Health:
        """Return the counters of handled messages and of messages in progress."""
        return merged_health([self._intake.health(), self._subtasks.health()])

    async def start(self) -> None:
        """Measure the capacity, then start to admit tasks and to answer requests."""
        await self._measure_capacity()  # the cluster may be full already
        await self._calibrations.start()
        await self._intake.start()
        await self._subtasks.start()
        await self._client_api.start()
        self._capacity_task = self._bus.tasks.spawn(self._update_capacity(), name="intake capacity", essential=True)
        self._sweep_task = self._bus.tasks.spawn(sweep(self._bus), name="sweep orphans")

    async def drain(self, timeout_s: float) -> None:
        """Stop taking messages and requests, and finish those in progress within `timeout_s` seconds."""
        await self._client_api.stop()
        await asyncio.gather(self._intake.drain(timeout_s), self._subtasks.drain(timeout_s))
        await self._calibrations.stop()
        for task in (self._capacity_task, self._sweep_task):
            if task is not None:
                task.cancel()

    async def admit(self, submission: Submission, delivery: Delivery) -> Outcome:
        """Admit a submission once, check its ad, and publish it with its estimate."""
        ad = submission.ad
        if not delivery.subject.endswith(f".{ad.task_id}"):
            return Dead("the subject names another task than the ad")
        self._capacity -= 1
        self._admissions += 1
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
            check_decoded_ad(ad, len(delivery.msg.data))
            await self._check_accept(ad)
        except InvalidTask as error:
            return Fail(TaskError.of(error), admitted)
        return await self._to_match(admitted)

    async def _check_accept(self, ad: TaskAd) -> None:
        try:
            await check_accept(ad, self._checks)
        except NotChecked as error:
            log.warning("accept_not_checked", reason=error.message)  # EVALUATE checks it with the result

    async def admit_subtask(self, envelope: Envelope, _delivery: Delivery) -> Outcome:
        """Admit a subtask or a delegated task; it ends at once if its parent has ended."""
        split = envelope.split
        if split is None:
            return Dead("neither a submission nor a subtask")
        admitted = await self._admission.admit(envelope, f"of-{split.parent}"[:64])
        if admitted is None:
            return Done()
        # Read after the child's record is written: a process that ends the parent finds the child, or is found here.
        parent = await self._admission.records.get(split.parent)
        if parent is None or parent.value.ended:
            return Fail(CANCELLED, admitted)
        try:
            await self._check_accept(admitted.ad)  # the ad of a delegated task is not checked before
        except InvalidTask as error:
            return Fail(TaskError.of(error), admitted)
        return await self._to_match(admitted)

    async def _to_match(self, envelope: Envelope) -> Outcome:
        left_s = envelope.deadline - self._bus.clock.now()
        if left_s <= 0:
            return Fail(
                TaskError(code="deadline_exceeded", message="the deadline passed before the task began"), envelope
            )
        envelope, spec = await self._estimated(envelope, left_s)
        if envelope.ad.estimated_complexity is None:
            spec = self._calibrations.apply(spec)
        spec = with_division(spec, envelope.ad, envelope.depth, self._config)
        return Next("match", replace(envelope, spec=spec))

    async def _estimated(self, envelope: Envelope, left_s: float) -> tuple[Envelope, Spec]:
        """Return the envelope, with the usage of a model's estimate, and the spec."""
        spec, unsure = estimate_task(envelope.ad)
        if not unsure or self._llm is None:
            return envelope, spec
        params = CompletionParams(
            messages=(UserMessage(prompt(envelope.ad)),),
            temperature=0.0,
            max_tokens=ESTIMATE_TOKENS,
            json_schema=estimate_schema(),
        )
        within_s, budget = min(left_s, self._timings.estimate_within_s), budget_before_run(envelope)
        answer = await call_llm(self._llm, params, read_estimate, within_s=within_s, budget=budget)
        envelope, estimate = with_phase_usage(envelope, "sense", answer.usage), answer.value
        if estimate is None:
            return envelope, replace(spec, note=f"the model could not be asked: {answer.why}")
        given = envelope.ad.estimated_complexity
        complexity = estimate.complexity if given is None else given
        return envelope, Spec(complexity=complexity, domains=estimate.domains, method="llm")

    def _window(self, lane: Lane, slots: Slots) -> int:
        """Return how many submissions a lane may still take, limited by its slots and by the capacity."""
        urgent = lane.name.endswith(("high", "critical"))
        capacity = self._capacity if urgent else self._capacity - int(self._config.max_in_flight * URGENT_SHARE)
        return min(slots.free, capacity)

    async def _update_capacity(self) -> None:
        """Measure the capacity periodically while it is in use."""
        while True:
            await asyncio.sleep(CAPACITY_EVERY_S)
            if self._capacity < self._config.max_in_flight:
                await self._measure_capacity()
                self._intake.top_up()

    async def _measure_capacity(self) -> None:
        in_progress, admissions = self._intake.health().in_hand, self._admissions
        try:
            stored = (await stream_state(self._bus, "TASKS"))["messages"]
            if stored <= self._config.max_in_flight * EXACT_COUNT_FROM:
                self._idle_messages, self._idle_expires_at = 0, 0.0
            elif time.monotonic() >= self._idle_expires_at:
                self._idle_messages = max(0, stored - await in_flight(self._bus))
                self._idle_expires_at = time.monotonic() + IDLE_COUNT_TTL_S
        except (LoomError, LookupError, TypeError) as error:  # LookupError, TypeError: an answer of another shape
            log.warning("intake_capacity_unknown", **error_fields(error))
        else:
            in_progress += self._admissions - admissions  # admitted during the request, and not counted in TASKS
            self._capacity = self._config.max_in_flight - max(0, stored - self._idle_messages) - in_progress
