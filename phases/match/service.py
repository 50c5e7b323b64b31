"""Match: award each task to the best of those who bid.

Consumes   task.match.<priority>.*   one lane per priority
           offer.*.*.<instance>.*    the offers to this replica's calls
           host.*.*                  announcements of node hosts
Publishes  auction.<domain_token>    a call for bids, answered by every node host
           task.scale                the envelope with its award, or without one when nobody at all bids
State      none of its own; profiles are read, never written; so are the records of tasks that wait
Gives up   no_bids when all who could have failed, or nobody bids for no_bids_after_s; deadline_exceeded
"""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace as replace_fields

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.delivery import Delivery, Slots
from loom.bus.hops.health import Health
from loom.bus.hops.hop_loop import HopLoop, Service, lane_slots
from loom.bus.hops.outcomes import Dead, Done, Fail, Later, Next, Outcome
from loom.bus.host_directory import HostKey
from loom.bus.logs.logger import get_logger
from loom.bus.topology import MATCH_LANES, Lane
from loom.phases.match.announced_nodes import Wanted
from loom.phases.match.award_policies import policy
from loom.phases.match.busy_nodes import BusyNodes
from loom.phases.match.directory import HostDirectory
from loom.phases.match.misspelt_domains import Misspelt, warning_in
from loom.phases.match.node_ownership import SETTLE_S
from loom.phases.match.offers import HostOffer
from loom.phases.match.open_calls import OpenCall, OpenCalls
from loom.phases.match.partial_decoding import ReadRecord
from loom.phases.match.plain_bids import PlainNodes
from loom.phases.match.recent_awards import RecentAwards
from loom.phases.match.scoring import AllBusy, AuctionContext, Awarded, Exhausted, Nobody, Verdict, decide
from loom.schemas.auction import BID_LIMIT, DESCRIPTION_BYTES, Award, Bid, CallForBids, Lot
from loom.schemas.base import Undecodable, cut_utf8
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import IN_HAND_S, Envelope, Spec
from loom.schemas.identity import qualified, split_qualified
from loom.schemas.task import TaskError

log = get_logger()

GATHER_S = 0.5
"""Time from asking the hosts to announce themselves to the first task: else the first host to do so would get it."""
HOLD_S = 5.0
"""How long a task that waits for bids is kept in hand before it goes to the tail of its lane."""
PAUSE_S = (0.1, 2.0)
"""Shortest and longest pause between two calls for a task that waits."""
ALONE_PAUSE_S = 1.0
"""Pause between two calls for a task that no node could do."""
MAX_REASON = 1000
"""Characters of a reason that names the tools a client asked for."""
DAY_S = 86_400.0


Found = Verdict | Fail | Later
"""What a look for a node came to."""


class Match:
    """The second phase.

    Args:
        hosts_here: Whether all node hosts are in this process, and start after this phase: it takes tasks at once.
            Else the first one is taken half a second after the hosts were asked to announce themselves.
    """

    def __init__(self, bus: Bus, config: ClusterConfig, *, hosts_here: bool = False) -> None:
        self._bus = bus
        self._config = config
        self._hosts_here = hosts_here
        self._awards = RecentAwards()
        self._records = bus.bucket("records", ReadRecord)
        self._roster = HostDirectory(bus, judged=self._on_judged)
        self._plain = PlainNodes(self._roster.nodes)
        self._busy = BusyNodes(self._roster.nodes)
        self._misspelt = Misspelt(self._roster.nodes)
        self._calls = OpenCalls(bus)
        self._policy = policy(config.policy)
        lanes = [(lane, lane_slots(lane)) for lane in MATCH_LANES]
        self._loop = HopLoop(bus, Service("match", lanes, Envelope, self.handle, window=self._window))

    def health(self) -> Health:
        """Return how far the work has got."""
        return self._loop.health()

    async def start(self) -> None:
        """Begin to hold auctions."""
        await self._calls.start()
        await self._roster.start()
        if not self._hosts_here:
            await asyncio.sleep(self._roster.asked_at + GATHER_S - time.monotonic())
        await self._loop.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, finish for at most `timeout_s`."""
        await self._loop.drain(timeout_s)
        await self._calls.stop()
        await self._roster.stop()

    async def handle(self, envelope: Envelope, delivery: Delivery) -> Outcome:
        """Find a node for the task; while all are busy, ask again."""
        spec = envelope.spec
        if spec is None:
            return Dead("the envelope came without a spec")
        if _comes_back(envelope) and await self._has_ended(envelope):
            return Done()
        self._free_last_node(envelope)
        envelope = replace(envelope, award=None, error=None, result=None)
        if self._bus.clock.now() >= envelope.deadline:
            return self._too_late(envelope, spec)
        if envelope.last_error is not None and envelope.last_error.code == "node_busy":
            pause_s = envelope.busy_pause_s  # a longer one has passed already
            if pause_s <= IN_HAND_S:
                with delivery.waiting():
                    await _pause(delivery, random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter
        new_nodes = self._roster.new_nodes
        verdict = await self._look(envelope, spec)
        if isinstance(verdict, AllBusy) or (isinstance(verdict, Nobody) and self._may_hold(spec, delivery)):
            waited = await self._wait(envelope, spec, delivery, verdict, new_nodes)
            if waited is None:
                return Done()
            verdict = waited
        return self._follow(verdict, envelope, spec)

    def _free_last_node(self, envelope: Envelope) -> None:
        """Record that the last attempt is over, and its node if that had no room."""
        self._plain.came_back(envelope.task_id, envelope.attempt)
        award, error = envelope.award, envelope.last_error
        if award is not None and error is not None and error.code == "node_busy":
            self._busy.rejected(envelope.task_id, (HostKey(award.owner, award.host_id), award.node_id))

    async def _look(self, envelope: Envelope, spec: Spec) -> Found:
        """Find a node once."""
        if envelope.ad.node_id is not None:
            return self._pinned(envelope, envelope.ad.node_id)
        return await self._auction(envelope, spec)

    def _may_hold(self, spec: Spec, delivery: Delivery) -> bool:
        """Whether a task that no node could do waits in hand, where it notices new nodes at once.

        SCALE has been asked for a node before, and half of what a lane keeps is for tasks that wait for busy nodes.
        """
        if spec.no_offers_since is None or 2 * delivery.slots.waiting >= self._config.waiting_limit:
            return False
        return self._bus.clock.now() - spec.no_offers_since < self._config.no_bids_after_s

    async def _wait(
        self,
        envelope: Envelope,
        spec: Spec,
        delivery: Delivery,
        verdict: Found,
        new_nodes: asyncio.Event,
    ) -> Found | None:
        """Look again, counted among those who wait, until something has changed or it has taken long enough.

        None: the task has ended meanwhile.

        Args:
            new_nodes: Set when a node was announced since the last look that was not known.
        """
        give_up = min(self._bus.clock.now() + HOLD_S, envelope.deadline)
        if isinstance(verdict, Nobody) and spec.no_offers_since is not None:
            give_up = min(give_up, spec.no_offers_since + self._config.no_bids_after_s)
        pause_s = PAUSE_S[0]
        with delivery.waiting():
            while self._bus.clock.now() < give_up and not delivery.recalled.is_set():
                left_s = max(0.0, give_up - self._bus.clock.now())
                if isinstance(verdict, AllBusy):
                    jitter_s = random.uniform(pause_s / 2, pause_s)  # noqa: S311 - not a secret
                    await _pause(delivery, min(jitter_s, left_s))
                    pause_s = min(2 * pause_s, PAUSE_S[1])
                elif isinstance(verdict, Nobody):
                    await _pause(delivery, min(ALONE_PAUSE_S, left_s), new_nodes)
                else:
                    break
                if await self._has_ended(envelope):
                    return None
                new_nodes = self._roster.new_nodes
                verdict = await self._look(envelope, spec)
        return verdict

    async def _has_ended(self, envelope: Envelope) -> bool:
        """Return whether the task's record has ended: by a cancel, say, while the task waited for bids."""
        try:
            entry = await self._records.get(envelope.task_id)
        except Undecodable:
            return False  # EXECUTE reads the whole record, and settles what cannot be read
        return entry is not None and entry.value.ended

    def _follow(self, verdict: Found, envelope: Envelope, spec: Spec) -> Outcome:
        match verdict:
            case Fail() | Later():
                return verdict
            case Awarded(award=award, warning=warning):
                log.info("awarded", node=award.node, host_id=award.host_id, score=round(award.score, 3))
                envelope = envelope.warned(warning) if warning else envelope
                return Next("scale", replace(_met_someone(envelope, spec), award=award))
            case Exhausted():
                return Fail(TaskError(code="no_bids", message="every node that could has failed this task"), envelope)
            case AllBusy():
                if self._bus.clock.now() >= envelope.deadline:
                    return self._too_late(envelope, spec)
                return Later(random.uniform(*PAUSE_S), _met_someone(envelope, spec))  # noqa: S311 - jitter
            case Nobody(warning=warning):
                envelope = envelope.warned(warning) if warning else envelope
                return self._alone(envelope, spec, self._why_nobody(envelope))

    def _alone(self, envelope: Envelope, spec: Spec, why: str) -> Outcome:
        """Nobody bids: ask SCALE for a node once, then call again until it has taken too long."""
        now = self._bus.clock.now()
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
            return f"{why}; start one that does with `loom host run FILE.py`, or name another domain"
        return (
            "no node is there to take the task; "
            "start one with `loom host run FILE.py`, or add one with `rt.add_agent(…)`"
        )

    def _pinned(self, envelope: Envelope, node: str) -> Found:
        """Award a task to the node it is pinned to, wherever that is."""
        owner, node_id = split_qualified(node)
        node = qualified(owner, node_id)
        if node in envelope.excluded:
            return Fail(
                TaskError(code="no_bids", message=f"the task is pinned to {node}, which has failed it"), envelope
            )
        if self._roster.is_contested(node):
            return Later(SETTLE_S, envelope)
        host = self._roster.host_of(node)
        if host is None:
            return Nobody()
        award = Award(node_id=node_id, owner=owner, host_id=host.host_id, pinned=True)
        return Awarded(self._counted_if_plain(award, envelope), Bid(node_id=node_id))

    def _counted_if_plain(self, award: Award, envelope: Envelope) -> Award:
        """Return the award; one to a plain node counts as its load, and states for EXECUTE how to run it."""
        place = (HostKey(award.owner, award.host_id), award.node_id)
        node = self._plain.award(place, envelope.task_id, envelope.attempt)
        return award if node is None else replace(award, plain=True, max_run_s=node.max_run_s)

    async def _auction(self, envelope: Envelope, spec: Spec) -> Verdict:
        """Call for bids, and judge the offers with those of plain nodes."""
        token = spec.domain_token
        wanted = Wanted(token, frozenset(envelope.ad.required_tools), envelope.excluded)
        call = await self._call_for_bids(envelope, spec)
        offers = [*_for_task(envelope.task_id, call.offers), *self._plain.offers(wanted)]
        verdict = decide(envelope, self._busy.without(envelope.task_id, offers), self._book())
        if isinstance(verdict, Awarded):
            verdict = replace_fields(verdict, award=self._counted_if_plain(verdict.award, envelope))
            self._awards.note(envelope, token, verdict)
        else:
            verdict = self._with_silent_hosts(verdict, call, wanted)
        if isinstance(verdict, Awarded | Nobody) and not self._roster.ranking.best(token, 1):
            warning = self._misspelt.warning_for(envelope)
            return replace_fields(verdict, warning=warning) if warning else verdict
        return verdict

    def _with_silent_hosts(self, verdict: Verdict, call: OpenCall, wanted: Wanted) -> Verdict:
        """Return what follows from offers without a winner and from the announcements of hosts that made none."""
        if isinstance(verdict, Exhausted) and call.missing:
            return AllBusy()  # a host that should have answered may have a node yet: slow is not gone
        if isinstance(verdict, Nobody) and self._roster.may_yet_bid(wanted, call.answered):
            return AllBusy()
        if isinstance(verdict, Nobody) and self._roster.only_plain and self._roster.have_failed(wanted):
            return Exhausted()
        return verdict

    async def _call_for_bids(self, envelope: Envelope, spec: Spec) -> OpenCall:
        """Return a call with the offers that came: none where all hosts have plain nodes alone, which answer none."""
        if self._roster.only_plain:
            return self._calls.unanswered()
        window_s = self._config.bid_window_ms / 1000
        call = await self._calls.publish(self._call(envelope, spec), self._roster.awaited(), window_s=window_s)
        self._roster.answered(call.offers, call.missing)
        return call

    def _on_judged(self, node: str, domain_token: str, attempt_ids: Iterable[str]) -> None:
        """Forget the awards of attempts that have been rewarded."""
        attempt_ids = tuple(attempt_ids)
        self._awards.judged(node, domain_token, attempt_ids)
        self._plain.judged(attempt_ids)

    def _book(self) -> AuctionContext:
        return AuctionContext(
            profiles=self._roster.profiles,
            newcomers=self._roster.newcomers,
            policy=self._policy,
            policy_name=self._config.policy,
            exploration=self._config.exploration,
            now=self._bus.clock.now(),
            half_life_s=self._config.half_life_days * DAY_S,
            taken=self._awards.taken(),
            pending=self._awards.pending(),
        )

    def _call(self, envelope: Envelope, spec: Spec) -> CallForBids:
        call_id, answer_to = self._calls.new_call()
        lot = Lot(
            task_id=envelope.task_id,
            attempt=envelope.attempt,
            complexity=spec.complexity,
            description=cut_utf8(envelope.ad.description, DESCRIPTION_BYTES)[0],
            priority=envelope.priority,
            remaining_s=max(0.0, envelope.deadline - self._bus.clock.now()),
        )
        return CallForBids(
            call_id=call_id,
            domain=spec.domains[0],
            required_tools=envelope.ad.required_tools,
            excluded=envelope.excluded,
            lots=(lot,),
            answer_to=answer_to,
            prefer=self._roster.ranking.best(spec.domain_token, BID_LIMIT),
        )

    def _window(self, _lane: Lane, slots: Slots) -> int:
        """No more is read of a lane in which many wait already."""
        return min(slots.free, self._config.waiting_limit - slots.waiting)


async def _pause(delivery: Delivery, seconds: float, news: asyncio.Event | None = None) -> None:
    """Wait until the time is over, the process stops or `news` is set."""
    recalled = asyncio.ensure_future(delivery.recalled.wait())
    waits = [recalled] if news is None else [recalled, asyncio.ensure_future(news.wait())]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _for_task(task_id: str, offers: Iterable[HostOffer]) -> Iterator[HostOffer]:
    """Yield the offers with the bids that are for a task alone."""
    for offer in offers:
        bids = tuple(bid for bid in offer.bids if bid.is_for(task_id))
        yield offer if len(bids) == len(offer.bids) else replace(offer, bids=bids)


def _comes_back(envelope: Envelope) -> bool:
    """Whether the task was scheduled, by MATCH or after a busy node: a first auction costs no read of its record."""
    last = envelope.hops[-1].phase if envelope.hops else ""
    return last == "match" or (last == "evaluate" and envelope.busy_pause_s > IN_HAND_S)


def _met_someone(envelope: Envelope, spec: Spec) -> Envelope:
    return envelope if spec.no_offers_since is None else replace(envelope, spec=replace(spec, no_offers_since=None))
