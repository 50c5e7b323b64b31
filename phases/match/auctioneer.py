"""Holds the auctions: calls for bids on tasks that are alike, and decides each of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace as replace_fields

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.host_directory import HostKey
from loom.phases.match.announced_nodes import TaskRequirements
from loom.phases.match.award_policies import load_policy
from loom.phases.match.busy_nodes import BusyNodes
from loom.phases.match.calls.joint_calls import AuctionedTask, JointCalls
from loom.phases.match.calls.open_calls import OpenCall, OpenCalls
from loom.phases.match.calls.plain_bids import PlainNodes
from loom.phases.match.calls.shortlist import Shortlist
from loom.phases.match.directory import HostDirectory
from loom.phases.match.misspelt_domains import MisspeltDomains
from loom.phases.match.ranked_bids import AllBusy, AuctionResult, Awarded, Exhausted, JointAuction, NoOffers
from loom.phases.match.recent_awards import RecentAwards
from loom.phases.match.scoring import URGENT, AuctionContext
from loom.phases.match.timings import MatchTimings
from loom.schemas.auction import BID_LIMIT, DESCRIPTION_BYTES, Award, CallForBids, Lot
from loom.schemas.base import cut_utf8
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec

DAY_S = 86_400.0


class Auctioneer:
    """Holds an auction for each task; tasks that are alike and arrive together share a call for bids.

    Its own awards count as load of their nodes until they show in bids or rewards.
    """

    def __init__(self, bus: Bus, config: ClusterConfig, timings: MatchTimings) -> None:
        self._bus = bus
        self._config = config
        self._policy = load_policy(config.policy)
        self.directory = HostDirectory(bus, timings, on_rewarded=self._on_rewarded)
        self._awards = RecentAwards()
        self._plain = PlainNodes(self.directory.nodes)
        self._busy = BusyNodes(self.directory.nodes)
        self._misspelt = MisspeltDomains(self.directory.nodes)
        self._calls = OpenCalls(bus, self.directory.record_late_answer)
        self._shortlist = Shortlist(self.directory)
        self._joint_calls = JointCalls(bus.tasks, self._hold)

    async def start(self) -> None:
        """Subscribe to offers and announcements."""
        await self._calls.start()
        await self.directory.start()

    async def stop(self) -> None:
        """Unsubscribe."""
        await self._calls.stop()
        await self.directory.stop()

    def release_previous_attempt(self, envelope: Envelope) -> None:
        """Free the slot of the previous attempt, and record its node as busy if it rejected the task."""
        self._plain.release_previous_attempt(envelope.task_id, envelope.attempt)
        award, error = envelope.award, envelope.last_error
        if award is not None and error is not None and error.code == "node_busy":
            self._busy.record_rejection(envelope.task_id, (HostKey(award.owner, award.host_id), award.node_id))

    def with_plain_node(self, award: Award, envelope: Envelope) -> Award:
        """Return the award; an award to a plain node is counted as load and marked for EXECUTE."""
        location = (HostKey(award.owner, award.host_id), award.node_id)
        node = self._plain.record_award(location, envelope.task_id, envelope.attempt)
        return award if node is None else replace(award, plain=True, max_run_s=node.max_run_s)

    async def hold_auction(self, envelope: Envelope, spec: Spec) -> AuctionResult:
        """Call for bids on the task, and return the result of its auction."""
        urgent = envelope.priority in URGENT  # urgent tasks may use slots that hosts keep from the others
        alike = (spec.domain_token, envelope.ad.required_tools, envelope.excluded, urgent)
        result = await self._joint_calls.join(alike, AuctionedTask(envelope, spec))
        if isinstance(result, Awarded | NoOffers) and not self.directory.ranking.best(spec.domain_token, 1):
            warning = self._misspelt.warning_for(envelope)
            return replace_fields(result, warning=warning) if warning else result
        return result

    async def _hold(self, tasks: Sequence[AuctionedTask]) -> None:
        """Publish one call for the tasks, and decide them by rank, each with the awards before it."""
        call = await self._call_for_bids(tasks)
        auction = JointAuction(call.offers, self._context())
        for task in sorted(tasks, key=lambda task: task.rank):
            if not task.result.done():
                task.result.set_result(self._decide(task, auction, call))

    def _decide(self, task: AuctionedTask, auction: JointAuction, call: OpenCall) -> AuctionResult:
        envelope, token = task.envelope, task.spec.domain_token
        plain = self._plain.offers(task.requirements)
        offers = self._busy.without_busy(envelope.task_id, [*auction.offers, *plain] if plain else auction.offers)
        result = auction.decide(envelope, offers)
        if isinstance(result, Awarded):
            result = replace_fields(result, award=self.with_plain_node(result.award, envelope))
            self._awards.record(envelope, token, result)
            auction.record(result.award)
            return result
        return self._with_silent_hosts(result, call, task.requirements)

    def _with_silent_hosts(
        self, result: AuctionResult, call: OpenCall, requirements: TaskRequirements
    ) -> AuctionResult:
        """Return the result of an auction without a winner, considering the hosts that made no offer."""
        if isinstance(result, Exhausted) and call.missing:
            return AllBusy()  # a slow host may still have a capable node
        if isinstance(result, NoOffers):
            if self.directory.may_yet_bid(requirements, call.answered):
                return AllBusy()
            if self.directory.only_plain and self.directory.have_plain_nodes_failed(requirements):
                return Exhausted()
        return result

    async def _call_for_bids(self, tasks: Sequence[AuctionedTask]) -> OpenCall:
        """Return a call with its offers; it stays empty where all hosts have plain nodes only.

        Where there are many hosts, a shortlist of them is called, and all hosts only if none of these bids.
        """
        if self.directory.only_plain:
            return self._calls.empty_call()
        hosts = self._shortlist.hosts_for(tasks[0].requirements, tasks[0].envelope.task_id)
        if hosts is not None:
            call = await self._publish_call(tasks, hosts)
            if any(offer.bids for offer in call.offers):
                return call
        return await self._publish_call(tasks, None)

    async def _publish_call(self, tasks: Sequence[AuctionedTask], hosts: Sequence[HostKey] | None) -> OpenCall:
        awaited = self.directory.awaited_hosts()
        call = await self._calls.publish(
            self._new_call(tasks),
            awaited if hosts is None else awaited.intersection(hosts),
            window_s=self._config.bid_window_ms / 1000,
            hosts=hosts,
        )
        self.directory.record_answers(call.offers, call.missing)
        return call

    def _new_call(self, tasks: Sequence[AuctionedTask]) -> CallForBids:
        call_id, answer_to = self._calls.new_call_id()
        first, now = tasks[0], self._bus.clock.now()
        return CallForBids(
            call_id=call_id,
            domain=first.spec.domains[0],
            required_tools=first.envelope.ad.required_tools,
            excluded=first.envelope.excluded,
            lots=tuple(_lot(task, now) for task in tasks),
            answer_to=answer_to,
            prefer=self.directory.ranking.best(first.spec.domain_token, BID_LIMIT),
        )

    def _context(self) -> AuctionContext:
        return AuctionContext(
            profiles=self.directory.profiles,
            newcomers=self.directory.newcomers,
            policy=self._policy,
            policy_name=self._config.policy,
            exploration=self._config.exploration,
            now=self._bus.clock.now(),
            half_life_s=self._config.half_life_days * DAY_S,
            recent_awards=self._awards.recent(),
            pending_awards=self._awards.pending(),
        )

    def _on_rewarded(self, node: str, domain_token: str, attempt_ids: Iterable[str]) -> None:
        """Remove the awards of attempts that have a reward."""
        attempt_ids = tuple(attempt_ids)
        self._awards.remove_rewarded(node, domain_token, attempt_ids)
        self._plain.release_rewarded(attempt_ids)


def _lot(task: AuctionedTask, now: float) -> Lot:
    envelope = task.envelope
    return Lot(
        task_id=envelope.task_id,
        attempt=envelope.attempt,
        complexity=task.spec.complexity,
        description=cut_utf8(envelope.ad.description, DESCRIPTION_BYTES)[0],
        priority=envelope.priority,
        remaining_s=max(0.0, envelope.deadline - now),
    )
