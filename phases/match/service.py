"""Match: award each task to the best bidder.

Consumes   task.match.<priority>.*   one lane per priority
           offer.*.*.<instance>.*    the offers to this replica's calls
           host.*.*                  announcements of node hosts
Publishes  auction.<domain_token>    a call for bids on one or several tasks, which every node host answers
           call.<owner>.<host>       the same call to each host of a shortlist, where there are more than 64 hosts
           task.execute              the envelope with its award
           task.scale                an envelope that SCALE has something to do with: to be divided, without offers, or
                                     awarded to a full node while a host can start another one
State      none of its own; reads node profiles, and the records of waiting tasks
Gives up   no_bids when all capable nodes have failed, or without offers for no_bids_after_s; deadline_exceeded
"""

import asyncio
import random
import time

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery, Slots
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import HopLoop, Service, lane_slots
from loom.bus.hops.outcomes import Dead, Done, Fail, Later, Next, Outcome
from loom.bus.logs.logger import get_logger
from loom.bus.topology import MATCH_LANES, Lane
from loom.phases.match.auctioneer import Auctioneer
from loom.phases.match.misspelt_domains import warning_in
from loom.phases.match.node_ownership import SETTLE_S
from loom.phases.match.partial_decoding import PartialRecord
from loom.phases.match.ranked_bids import AllBusy, AuctionResult, Awarded, Exhausted, NoOffers
from loom.phases.match.timings import MatchTimings
from loom.phases.shared.pace import Pace
from loom.phases.shared.scale_rule import scale_reason
from loom.schemas.auction import Award, Bid
from loom.schemas.base import Undecodable
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import IN_HAND_S, Envelope, Spec
from loom.schemas.identity import qualified, split_qualified
from loom.schemas.task import TaskError

log = get_logger()

MAX_REASON = 1000
"""Characters of an error message that lists the required tools."""

Verdict = AuctionResult | Fail | Later
"""The result of one search for a node."""


class Match:
    """The MATCH service: holds an auction for each task and publishes the task with its award.

    Tasks wait while all capable nodes are busy. SCALE is asked once to start a node for a task without offers.

    Args:
        hosts_here: Whether all node hosts are in this process and start after this phase. MATCH then takes tasks at
            once; otherwise it starts half a second after its request for announcements.
        timings: Waits and pauses.
    """

    def __init__(
        self, bus: Bus, config: ClusterConfig, *, hosts_here: bool = False, timings: MatchTimings = MatchTimings()
    ) -> None:
        self._bus = bus
        self._config = config
        self._hosts_here = hosts_here
        self._records = bus.bucket("records", PartialRecord)
        self._timings = timings
        self._auctioneer = Auctioneer(bus, config, timings)
        self._directory = self._auctioneer.directory
        self._spawn_pace = Pace(timings.spawn_every_s)
        lanes = [(lane, lane_slots(lane)) for lane in MATCH_LANES]
        self._loop = HopLoop(bus, Service("match", lanes, Envelope, self.handle, window=self._window))

    def health(self) -> Health:
        """Return the counters of handled messages and of messages in progress."""
        return self._loop.health()

    async def start(self) -> None:
        """Subscribe to offers and announcements, then take tasks."""
        await self._auctioneer.start()
        if not self._hosts_here:
            begin_at = self._directory.announcements_requested_at + self._timings.announce_wait_s
            await asyncio.sleep(begin_at - time.monotonic())
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Stop taking tasks, and finish those in progress within `timeout_s` seconds."""
        await self._loop.drain(timeout_s)
        await self._auctioneer.stop()

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Award the task to a node; while all nodes are busy, repeat the call for bids."""
        spec = envelope.spec
        if spec is None:
            return Dead("the envelope came without a spec")
        if _was_rescheduled(envelope) and await self._task_has_ended(envelope):
            return Done()
        self._auctioneer.release_previous_attempt(envelope)
        envelope = replace(envelope, award=None, error=None, result=None)
        if self._bus.clock.now() >= envelope.deadline:
            return self._deadline_exceeded(envelope, spec)
        if envelope.last_error is not None and envelope.last_error.code == "node_busy":
            pause_s = envelope.busy_pause_s  # longer pauses have passed already, on a schedule
            if pause_s <= IN_HAND_S:
                with delivery.waiting():
                    await _pause(delivery, random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter
        node_added = self._directory.node_added
        verdict = await self._find_node(envelope, spec)
        if isinstance(verdict, AllBusy) or (isinstance(verdict, NoOffers) and self._may_wait_for_node(spec, delivery)):
            waited = await self._wait_for_node(envelope, spec, delivery, verdict, node_added)
            if waited is None:
                return Done()
            verdict = waited
        return self._to_outcome(verdict, envelope, spec)

    async def _find_node(self, envelope: Envelope, spec: Spec) -> Verdict:
        """Search for a node once."""
        if envelope.ad.node_id is not None:
            return self._award_pinned(envelope, envelope.ad.node_id)
        return await self._auctioneer.hold_auction(envelope, spec)

    def _may_wait_for_node(self, spec: Spec, delivery: Delivery) -> bool:
        """Return whether a task without offers may wait in memory, where it reacts to a new node at once.

        SCALE must have been asked for a node before. Half of the waiting places of a lane are kept for tasks whose
        nodes are busy.
        """
        if spec.no_offers_since is None or 2 * delivery.slots.waiting >= self._config.waiting_limit:
            return False
        return self._bus.clock.now() - spec.no_offers_since < self._config.no_bids_after_s

    async def _wait_for_node(
        self,
        envelope: Envelope,
        spec: Spec,
        delivery: Delivery,
        verdict: Verdict,
        node_added: asyncio.Event,
    ) -> Verdict | None:
        """Search again until the result changes or the hold time has passed; None when the task has ended meanwhile.

        Args:
            node_added: Set by the first announcement of a new node since the last search.
        """
        give_up = min(self._bus.clock.now() + self._timings.max_hold_s, envelope.deadline)
        if isinstance(verdict, NoOffers) and spec.no_offers_since is not None:
            give_up = min(give_up, spec.no_offers_since + self._config.no_bids_after_s)
        pause_s = self._timings.min_pause_s
        with delivery.waiting():
            while self._bus.clock.now() < give_up and not delivery.recalled.is_set():
                left_s = max(0.0, give_up - self._bus.clock.now())
                if isinstance(verdict, AllBusy):
                    jitter_s = random.uniform(pause_s / 2, pause_s)  # noqa: S311 - not a secret
                    await _pause(delivery, min(jitter_s, left_s))
                    pause_s = min(2 * pause_s, self._timings.max_pause_s)
                elif isinstance(verdict, NoOffers):
                    await _pause(delivery, min(self._timings.no_offers_pause_s, left_s), node_added)
                else:
                    break
                if await self._task_has_ended(envelope):
                    return None
                node_added = self._directory.node_added
                verdict = await self._find_node(envelope, spec)
        return verdict

    async def _task_has_ended(self, envelope: Envelope) -> bool:
        """Return whether the task's record has ended, for example by a cancel while the task waited."""
        try:
            entry = await self._records.get(envelope.task_id)
        except Undecodable:
            return False  # EXECUTE reads the whole record, and handles one that cannot be decoded
        return entry is not None and entry.value.ended

    def _to_outcome(self, verdict: Verdict, envelope: Envelope, spec: Spec) -> Outcome:
        match verdict:
            case Fail() | Later():
                return verdict
            case Awarded(award=award, warning=warning):
                log.info("awarded", node=award.node, host_id=award.host_id, score=round(award.score, 3))
                envelope = envelope.warned(warning) if warning else envelope
                return self._to_next_phase(replace(_with_offers(envelope, spec), award=award))
            case Exhausted():
                return Fail(TaskError(code="no_bids", message="every capable node has failed this task"), envelope)
            case AllBusy():
                if self._bus.clock.now() >= envelope.deadline:
                    return self._deadline_exceeded(envelope, spec)
                pause_s = random.uniform(self._timings.min_pause_s, self._timings.max_pause_s)  # noqa: S311 - jitter
                return Later(pause_s, _with_offers(envelope, spec))
            case NoOffers(warning=warning):
                envelope = envelope.warned(warning) if warning else envelope
                return self._on_no_offers(envelope, spec, self._no_offers_reason(envelope))

    def _to_next_phase(self, envelope: Envelope) -> Next:
        """Pass an awarded task to EXECUTE, or to SCALE if it is to be divided or one more node is wanted."""
        match scale_reason(envelope):
            case None:
                return Next("execute", envelope)
            case "saturated":
                wanted = self._directory.can_spawn and self._spawn_pace.allows(envelope.domain_token)
                return Next("scale" if wanted else "execute", envelope)
            case _:
                return Next("scale", envelope)

    def _on_no_offers(self, envelope: Envelope, spec: Spec, why: str) -> Outcome:
        """Ask SCALE for a node the first time; then repeat the call until no_bids_after_s has passed."""
        now = self._bus.clock.now()
        if spec.no_offers_since is None:
            return Next("scale", replace(envelope, spec=replace(spec, no_offers_since=now)))
        if now - spec.no_offers_since >= self._config.no_bids_after_s:
            return Fail(TaskError(code="no_bids", message=why), envelope)
        return Later(min(self._timings.no_offers_pause_s, max(0.0, envelope.deadline - now)), envelope)

    def _deadline_exceeded(self, envelope: Envelope, spec: Spec) -> Outcome:
        why = "all nodes were busy" if spec.no_offers_since is None else self._no_offers_reason(envelope)
        return Fail(
            TaskError(code="deadline_exceeded", message=f"the deadline passed before the award: {why}"), envelope
        )

    def _no_offers_reason(self, envelope: Envelope) -> str:
        if envelope.ad.node_id is not None:
            return f"the task is pinned to {envelope.ad.node_id}, which no present host announces"
        if envelope.ad.required_tools and self._directory.has_hosts:
            return f"no node has all of the required tools: {', '.join(envelope.ad.required_tools)}"[:MAX_REASON]
        if (warning := warning_in(envelope)) is not None:
            return warning
        if self._directory.has_nodes:
            why = f"no node accepts tasks of the domain {envelope.domain!r}"
            return f"{why}; start a node for it with `loom host run FILE.py`, or name another domain"
        return "no node is running; start one with `loom host run FILE.py`, or add one with `rt.add_agent(…)`"

    def _award_pinned(self, envelope: Envelope, node: str) -> Verdict:
        """Award a task to the node it is pinned to, on whichever host that is."""
        owner, node_id = split_qualified(node)
        node = qualified(owner, node_id)
        if node in envelope.excluded:
            return Fail(
                TaskError(code="no_bids", message=f"the task is pinned to {node}, which has failed it"), envelope
            )
        if self._directory.is_contested(node):
            return Later(SETTLE_S, envelope)
        host = self._directory.host_of(node)
        if host is None:
            return NoOffers()
        award = Award(node_id=node_id, owner=owner, host_id=host.host_id, pinned=True)
        return Awarded(self._auctioneer.with_plain_node(award, envelope), Bid(node_id=node_id))

    def _window(self, _lane: Lane, slots: Slots) -> int:
        """Return how many messages a lane may take; waiting tasks reduce the number."""
        return min(slots.free, self._config.waiting_limit - slots.waiting)


async def _pause(delivery: Delivery, seconds: float, node_added: asyncio.Event | None = None) -> None:
    """Wait until the time has passed, the delivery is recalled or `node_added` is set."""
    recalled = asyncio.ensure_future(delivery.recalled.wait())
    waits = [recalled] if node_added is None else [recalled, asyncio.ensure_future(node_added.wait())]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _was_rescheduled(envelope: Envelope) -> bool:
    """Return whether the task was scheduled by MATCH, or by EVALUATE after a busy node.

    The first auction of a task saves the read of its record.
    """
    last = envelope.hops[-1].phase if envelope.hops else ""
    return last == "match" or (last == "evaluate" and envelope.busy_pause_s > IN_HAND_S)


def _with_offers(envelope: Envelope, spec: Spec) -> Envelope:
    return envelope if spec.no_offers_since is None else replace(envelope, spec=replace(spec, no_offers_since=None))
