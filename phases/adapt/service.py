"""Adapt: apply rewards to the profiles of nodes, and retire spawned nodes that the cluster does not need.

Consumes   the RewardBus (stream REWARDS), whole, in stream order; host announcements
Publishes  lifecycle.adapt.learned.<owner>.<node>   a profile has changed
           lifecycle.adapt.changed.<owner>.<node>   the node itself has changed, and its earlier scores are dropped
           retire.<owner>.<host>                    a request to retire an idle or failing spawned node
           reward.adapt.<owner>.<node>.<domain>     what another node inherits from a retired one
           reward.adapt.<owner>.<node>._snapshot    each profile, before the stream drops the rewards it rests on
State      NodeProfiles, one compare-and-set per node and batch; a replica whose write conflicts stands by.
           A summary next to each profile, which MATCH reads
           The bias of SENSE's estimates in each domain, written the same way
Gives up   an undecodable reward is logged and skipped; no other service waits for it
"""

import asyncio

from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.log_fields import summary as summary_of
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.stored_rewards import reward_in
from loom.phases.adapt.calibration_writer import CalibrationWriter
from loom.phases.adapt.evidence import forgets
from loom.phases.adapt.profile_writer import ProfileWriter
from loom.phases.adapt.retirement import RetirementSweeper
from loom.phases.adapt.reward_weights import weights_of
from loom.phases.adapt.snapshots import Snapshots
from loom.phases.adapt.timings import AdaptTimings
from loom.schemas.base import total_s
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError

log = get_logger()


class Adapt:
    """Reads the stream of rewards, applies each to profiles and calibrations, and writes them in batches.

    Snapshots and the retirement of nodes run next to it, on a read-only view of the profiles.

    Args:
        bus: A connected bus.
        config: Award policy, weights of reward sources, and limits of retirement.
        timings: Intervals.
    """

    def __init__(self, bus: Bus, config: ClusterConfig, *, timings: AdaptTimings = AdaptTimings()) -> None:
        self._bus = bus
        self._timings = timings
        self._dirty = asyncio.Event()
        self._writer = ProfileWriter(
            bus,
            forget=forgets(config.policy),
            weights=weights_of(config.judge_weights),
            on_change=self._dirty.set,
            standby_s=timings.standby_s,
        )
        self._profiles = self._writer.profiles
        self._retirement = RetirementSweeper(bus, config, self._profiles, timings)
        self._snapshots = Snapshots(bus, self._profiles, timings)
        self._calibrations = CalibrationWriter(bus)
        self._reader = OrderedConsumer(
            bus.jetstream, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*", "*", "*")
        )
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def health(self) -> Health:
        """Return the last sequence read, and how many profiles have waited for how long to be written."""
        writer = self._writer
        return Health(in_hand=writer.unwritten, oldest_s=total_s(writer.unwritten_s), last_seq=writer.read_seq)

    async def start(self) -> None:
        """Load profiles and calibrations, then read the whole stream; rewards applied before are skipped."""
        await self._calibrations.start(await self._writer.load())
        await self._snapshots.start()
        await self._reader.start()
        self._tasks = [
            self._bus.tasks.spawn(self._read(), name="apply rewards", essential=True),
            self._bus.tasks.spawn(self._write(), name="write profiles", essential=True),
            self._bus.tasks.spawn(self._writer.follow(), name="follow profiles", essential=True),
            self._bus.tasks.spawn(self._writer.follow_summaries(), name="follow summaries", essential=True),
        ]
        await self._retirement.start()

    async def drain(self, timeout_s: float) -> None:
        """Stop reading, and write changed profiles for at most `timeout_s`; the stream keeps all other rewards."""
        await self._retirement.stop()
        await self._snapshots.stop()
        await self._reader.stop()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(timeout_s):
                await self._flush()
        except (LoomError, TimeoutError) as error:
            log.info("profiles_not_flushed", **error_fields(error))

    async def _read(self) -> None:
        generation = self._reader.generation
        while True:
            batch = await self._reader.batch()
            if self._reader.generation != generation:
                generation = self._reader.generation
                await self._on_stream_reset()
            for message in batch:
                self._process(message)

    async def _on_stream_reset(self) -> None:
        """Continue with a new stream, which has replaced a lost one and begins at its first sequence."""
        async with self._writing:
            self._writer.on_stream_reset()
            self._calibrations.on_stream_reset()
            self._snapshots.on_stream_reset()
        self._dirty.set()

    def _process(self, message: StoredMessage) -> None:
        self._writer.read_seq = message.seq
        reward = reward_in(message, self._bus.subjects, self._bus.discards)
        try:
            if reward is not None:
                if self._calibrations.apply(message.seq, reward):
                    self._dirty.set()
                self._writer.apply(message.seq, reward)
        except Exception as error:  # noqa: BLE001 - no content of a reward may end the learning from all others
            self._bus.discards.add("reward_not_applied", reason=summary_of(error), subject=message.subject)
        self._snapshots.count(message, reward)

    async def _write(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(
                max(self._timings.batch_s, self._writer.standby_s)
            )  # rewards that arrive meanwhile share the write
            self._dirty.clear()
            try:
                await self._flush()
            except LoomError as error:
                log.warning("profiles_not_written", reason=error.message)
                self._dirty.set()
                await asyncio.sleep(self._timings.standby_s)

    async def _flush(self) -> None:
        async with self._writing:
            await self._writer.flush()
            await self._calibrations.flush()
