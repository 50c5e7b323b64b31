"""Match: award each task to the best of those who bid.

Consumes   task.match.<priority>.*   one lane per priority
Publishes  auction.<domain_token>            a call for bids, answered by every node host
           task.scale                the envelope with its award, or without one when nobody at all bids
State      none of its own; profiles are read, never written; so are the records of tasks that wait
Gives up   no_bids when all who could have failed, or nobody bids for no_bids_after_s; deadline_exceeded
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from secrets import token_hex

from msgspec.structs import replace

from loom.bus.client import Bus
from loom.bus.delivery import Delivery, Slots
from loom.bus.health import Health
from loom.bus.kv import Bucket
from loom.bus.log import get_logger
from loom.bus.loop import HopLoop, Service, lane_slots
from loom.bus.outcome import Dead, Done, Fail, Later, Next, Outcome
from loom.bus.scatter import scatter
from loom.bus.topology import MATCH_LANES, Lane
from loom.phases.match.awards import Awards
from loom.phases.match.claims import SETTLE_S
from loom.phases.match.misspelt import warning_for, warning_in
from loom.phases.match.policy import AllBusy, Awarded, Book, Exhausted, Nobody, Verdict, judge
from loom.phases.match.reading import OfferReader, ReadOffer, ReadRecord
from loom.phases.match.roster import Roster
from loom.phases.match.trust import policy
from loom.schemas.auction import BID_LIMIT, DESCRIPTION_BYTES, CallForBids
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import IN_HAND_S, Award, Envelope, Spec
from loom.schemas.task import TaskError
from loom.schemas.wire import Undecodable, cut_utf8

log = get_logger()

HOLD_S = 5.0  # a busy cluster is asked again for so long before the task goes to the tail
PAUSE_S = (0.1, 2.0)  # shortest and longest pause between two calls
ALONE_PAUSE_S = 1.0
MAX_REASON = 1000
"""Characters of a reason that names the tools a client asked for."""
DAY_S = 86_400.0


class Match:
    """The second phase."""

    def __init__(self, bus: Bus, config: ClusterConfig) -> None:
        self._bus = bus
        self._config = config
        self._awards = Awards()
        self._records = Bucket(bus, "records", ReadRecord)
        self._roster = Roster(bus, judged=self._awards.judged)
        self._policy = policy(config.policy)
        lanes = [(lane, lane_slots(lane)) for lane in MATCH_LANES]
        self._loop = HopLoop(bus, Service("match", lanes, Envelope, self.handle, window=self._window))

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to hold auctions."""
        await self._roster.start()
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._loop.drain(timeout_s)
        await self._roster.stop()

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Find a node for the task; while all are busy, ask again."""
        spec = envelope.spec
        if spec is None:
            return Dead("the envelope came without a spec")
        if _comes_back(envelope) and await self._has_ended(envelope):
            return Done()
        envelope = replace(envelope, award=None, error=None, result=None)
        if self._bus.now() >= envelope.deadline:
            return self._too_late(envelope, spec)
        if envelope.last_error is not None and envelope.last_error.code == "node_busy":
            pause_s = envelope.busy_pause_s  # a longer one has passed already
            if pause_s <= IN_HAND_S:
                with _counted(delivery):
                    await _pause(delivery, random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter
        if envelope.ad.node_id is not None:
            return self._pinned(envelope, spec, envelope.ad.node_id)
        verdict = await self._auction(envelope, spec)
        if isinstance(verdict, AllBusy):
            waited = await self._wait(envelope, spec, delivery)
            if waited is None:
                return Done()
            verdict = waited
        return self._follow(verdict, envelope, spec)

    async def _wait(self, envelope: Envelope, spec: Spec, delivery: Delivery) -> Verdict | None:
        """Call again, counted among those who wait, until something has changed or it has taken long enough.

        None: the task has ended meanwhile.
        """
        give_up = min(self._bus.now() + HOLD_S, envelope.deadline)
        verdict: Verdict = AllBusy()
        pause_s = PAUSE_S[0]
        with _counted(delivery):
            while isinstance(verdict, AllBusy) and self._bus.now() < give_up and not delivery.recalled.is_set():
                jitter_s = random.uniform(pause_s / 2, pause_s)  # noqa: S311 - not a secret
                await _pause(delivery, min(jitter_s, give_up - self._bus.now()))
                pause_s = min(2 * pause_s, PAUSE_S[1])
                if await self._has_ended(envelope):
                    return None
                verdict = await self._auction(envelope, spec)
        return verdict

    async def _has_ended(self, envelope: Envelope) -> bool:
        """Return whether the task's record has ended: by a cancel, say, while the task waited for bids."""
        try:
            entry = await self._records.get(envelope.task_id)
        except Undecodable:
            return False  # EXECUTE reads the whole record, and settles what cannot be read
        return entry is not None and entry.value.ended

    def _follow(self, verdict: Verdict, envelope: Envelope, spec: Spec) -> Outcome:
        match verdict:
            case Awarded(award=award, warning=warning):
                log.info("awarded", node_id=award.node_id, host_id=award.host_id, score=round(award.score, 3))
                envelope = envelope.warned(warning) if warning else envelope
                return Next("scale", replace(_met_someone(envelope, spec), award=award))
            case Exhausted():
                return Fail(TaskError(code="no_bids", message="every node that could has failed this task"), envelope)
            case AllBusy():
                if self._bus.now() >= envelope.deadline:
                    return self._too_late(envelope, spec)
                return Later(random.uniform(*PAUSE_S), _met_someone(envelope, spec))  # noqa: S311 - jitter
            case Nobody(warning=warning):
                envelope = envelope.warned(warning) if warning else envelope
                return self._alone(envelope, spec, self._why_nobody(envelope))

    def _alone(self, envelope: Envelope, spec: Spec, why: str) -> Outcome:
        """Nobody bids: ask SCALE for a node once, then call again until it has taken too long."""
        now = self._bus.now()
        if spec.no_offers_since is None:
            return Next("scale", replace(envelope, spec=replace(spec, no_offers_since=now)))
        if now - spec.no_offers_since >= self._config.no_bids_after_s:
            return Fail(TaskError(code="no_bids", message=why), envelope)
        return Later(min(ALONE_PAUSE_S, max(0.0, envelope.deadline - now)), envelope)

    def _too_late(self, envelope: Envelope, spec: Spec) -> Outcome:
        why = "all nodes were busy" if spec.no_offers_since is None else self._why_nobody(envelope)
        return Fail(
            TaskError(code="deadline_exceeded", message=f"the deadline passed before the award: {why}"), envelope
        )

    def _why_nobody(self, envelope: Envelope) -> str:
        if envelope.ad.node_id is not None:
            return f"the task is pinned to {envelope.ad.node_id}, which is not there"
        if envelope.ad.required_tools and self._roster.has_hosts:
            return f"no node has all of the required tools: {', '.join(envelope.ad.required_tools)}"[:MAX_REASON]
        if (warning := warning_in(envelope)) is not None:
            return warning
        if self._roster.has_nodes:
            why = f"no node takes tasks of the domain {envelope.domain!r}"
            return f"{why}; start one that does with `loom node FILE.py`, or name another domain"
        return (
            "no node is there to take the task; start one with `loom node FILE.py`, or add one with `rt.add_agent(…)`"
        )

    def _pinned(self, envelope: Envelope, spec: Spec, node_id: str) -> Outcome:
        if node_id in envelope.excluded:
            return Fail(
                TaskError(code="no_bids", message=f"the task is pinned to {node_id}, which has failed it"), envelope
            )
        if self._roster.is_contested(node_id):
            return Later(SETTLE_S, envelope)
        host_id = self._roster.host_of(node_id)
        if host_id is None:
            return self._alone(envelope, spec, self._why_nobody(envelope))
        award = Award(node_id=node_id, host_id=host_id, pinned=True)
        return Next("scale", replace(_met_someone(envelope, spec), award=award))

    async def _auction(self, envelope: Envelope, spec: Spec) -> Verdict:
        domain_token = spec.domain_token
        missing = self._roster.awaited()
        anybody = bool(missing)

        def enough(offers: list[ReadOffer]) -> bool:
            missing.discard(offers[-1].host_id)
            return anybody and not missing

        offers = await scatter(
            self._bus,
            self._bus.subjects.of("auction", domain_token),
            self._call(envelope, spec, domain_token),
            OfferReader(self._bus.discards, BID_LIMIT),
            window_s=self._config.bid_window_ms / 1000,
            enough=enough,
        )
        self._roster.answered(offers, missing)
        verdict = judge(envelope, offers, self._book())
        if isinstance(verdict, Awarded):
            self._awards.note(envelope, domain_token, verdict)
        if isinstance(verdict, Exhausted) and missing:
            return AllBusy()  # a host that should have answered may have a node yet: slow is not gone
        if isinstance(verdict, Awarded | Nobody) and not missing and not self._roster.ranking.best(domain_token, 1):
            warning = warning_for(envelope, offers)
            return replace_fields(verdict, warning=warning) if warning else verdict
        return verdict

    def _book(self) -> Book:
        return Book(
            profiles=self._roster.profiles,
            policy=self._policy,
            policy_name=self._config.policy,
            exploration=self._config.exploration,
            now=self._bus.now(),
            half_life_s=self._config.half_life_days * DAY_S,
            taken=self._awards.taken(),
            pending=self._awards.pending(),
        )

    def _call(self, envelope: Envelope, spec: Spec, domain_token: str) -> CallForBids:
        return CallForBids(
            auction_id=token_hex(16),
            task_id=envelope.task_id,
            attempt=envelope.attempt,
            domain_token=domain_token,
            domain=spec.domains[0],
            complexity=spec.complexity,
            required_tools=envelope.ad.required_tools,
            description=cut_utf8(envelope.ad.description, DESCRIPTION_BYTES)[0],
            remaining_s=max(0.0, envelope.deadline - self._bus.now()),
            excluded=envelope.excluded,
            prefer=self._roster.ranking.best(domain_token, BID_LIMIT),
        )

    def _window(self, _lane: Lane, slots: Slots) -> int:
        """No more is read of a lane in which many wait already."""
        return min(slots.free, self._config.waiting_limit - slots.waiting)


@contextmanager
def _counted(delivery: Delivery) -> Iterator[None]:
    """Count a delivery among those that only wait, of which a lane keeps few."""
    delivery.release()
    delivery.slots.waiting += 1
    try:
        yield
    finally:
        delivery.slots.waiting -= 1


async def _pause(delivery: Delivery, seconds: float) -> None:
    """Wait until the time is over or the process stops."""
    try:
        async with asyncio.timeout(seconds):
            await delivery.recalled.wait()
    except TimeoutError:
        pass  # the normal end of a pause


def _comes_back(envelope: Envelope) -> bool:
    """Whether MATCH itself had scheduled the task: a first auction costs no read of its record."""
    return bool(envelope.hops) and envelope.hops[-1].phase == "match"


def _met_someone(envelope: Envelope, spec: Spec) -> Envelope:
    return envelope if spec.no_offers_since is None else replace(envelope, spec=replace(spec, no_offers_since=None))
