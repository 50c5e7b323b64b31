"""The state that a cluster leaves in its streams, and the invariants that hold for it."""

from collections import Counter
from dataclasses import dataclass

from loom.bus.bus import Bus
from loom.bus.natsio.ordered_consumer import OrderedConsumer
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.queries import records_stream
from loom.bus.stored_rewards import reward_in
from loom.bus.topology import stream_state
from loom.phases.adapt.evidence import apply_reward
from loom.schemas.base import decode
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from support.wait import until
from support.workload import Workload


@dataclass(frozen=True)
class ClusterState:
    """Records, rewards, profiles and plans, as the streams and buckets hold them."""

    records: dict[str, TaskRecord]
    rewards: list[tuple[int, Reward]]
    """Sequence numbers and rewards, oldest first."""
    profiles: dict[str, NodeProfile]
    dead: int
    """Messages in the stream of dead letters."""
    plans: dict[str, SplitPlan]

    def rebuilt_profiles(self) -> dict[str, NodeProfile]:
        """Return the profiles that a rebuild from the stream alone gives."""
        rebuilt: dict[str, NodeProfile] = {}
        for seq, reward in self.rewards:
            known = rebuilt.get(reward.node_key, NodeProfile(node_id=reward.node_id, owner=reward.owner))
            rebuilt[reward.node_key] = apply_reward(known, reward, seq, forget=True)
        return rebuilt

    def unrewarded(self) -> list[str]:
        """Return the tasks that succeeded without a reward for their node."""
        reward_ids = {reward.reward_id for _, reward in self.rewards}
        return [
            task_id
            for task_id, record in self.records.items()
            if record.state == "succeeded" and f"{task_id}:{record.envelope.attempt}:rules" not in reward_ids
        ]

    def has_ended(self, task_id: str) -> bool:
        """Return whether a task has a record with an end."""
        record = self.records.get(task_id)
        return record is not None and record.ended


async def read_state(bus: Bus) -> ClusterState:
    """Read the state of the cluster from its streams and buckets."""
    stream, subject = records_stream(bus)
    records = {}
    for message in await _read_all(OrderedConsumer(bus.jetstream, stream, filter=subject, deliver="last_per_subject")):
        record = decode(message.data, TaskRecord)
        records[record.task_id] = record
    stored = await _read_all(
        OrderedConsumer(
            bus.jetstream, bus.subjects.stream("REWARDS"), filter=bus.subjects.of("reward", "*", "*", "*", "*")
        )
    )
    usable = [(message.seq, reward_in(message, bus.subjects, bus.discards)) for message in stored]
    rewards = [(seq, reward) for seq, reward in usable if reward is not None]
    profiles = {}
    for name in {reward.node_key for _, reward in rewards}:
        entry = await bus.bucket("nodes", NodeProfile).get(name)
        if entry is not None:
            profiles[name] = entry.value
    return ClusterState(
        records=records,
        rewards=rewards,
        profiles=profiles,
        dead=(await stream_state(bus, "DEAD"))["messages"],
        plans={
            task_id: plan.value
            for task_id, record in records.items()
            if "plan" in record.envelope.ad.context and (plan := await bus.bucket("plans", SplitPlan).get(task_id))
        },
    )


async def _read_all(reader: OrderedConsumer) -> list[StoredMessage]:
    messages: list[StoredMessage] = []
    try:
        while not reader.caught_up:
            messages += await reader.batch()
    finally:
        await reader.stop()
    return messages


async def learned_state(bus: Bus) -> ClusterState:
    """Wait until ADAPT has applied every reward of the stream, and return the state."""

    async def learned() -> ClusterState | None:
        state = await read_state(bus)
        return state if state.rebuilt_profiles() == state.profiles else None

    state = await until(learned, within_s=30, what="the profiles equal a rebuild from the stream")
    assert state is not None
    return state


def check(workload: Workload, state: ClusterState, runs: list[str]) -> None:
    """Check every invariant: tasks end once, attempts run once, successes are rewarded, rewards count once.

    Args:
        workload: The tasks that were submitted and the ends that were seen.
        state: What the cluster holds after the last task has ended.
        runs: One line for each run that a node started; equal lines are the same attempt.
    """
    lost = [task_id for task_id in workload.accepted if not state.has_ended(task_id)]
    assert not lost, f"{len(lost)} accepted tasks have not ended: {lost[:5]}"
    unfinished = [task_id for task_id, record in state.records.items() if not record.ended]
    assert not unfinished, f"records without an end: {unfinished[:5]}"
    assert not workload.ended_twice, f"ended twice: {workload.ended_twice[:5]}"
    repeated = [run for run, times in Counter(runs).items() if times > 1]
    assert not repeated, f"attempts that ran twice: {repeated[:5]}"
    check_plans(workload, state)
    cancelled = [task_id for task_id in workload.cancelled if not state.has_ended(task_id)]
    assert not cancelled, f"cancelled tasks that go on: {cancelled[:5]}"
    assert not state.unrewarded(), f"successes without a reward: {state.unrewarded()[:5]}"
    counted = sum(profile.total_tasks for profile in state.profiles.values())
    earned = len({reward.reward_id for _, reward in state.rewards})
    assert counted <= earned, f"{earned} rewards were counted as {counted}"  # a late reward may not count


def check_plans(workload: Workload, state: ClusterState) -> None:
    """Check that every divided task has a plan that is done, with a record for each of its subtasks."""
    divided = [task_id for task_id in workload.accepted if "plan" in state.records[task_id].envelope.ad.context]
    for task_id in divided:
        record, plan = state.records[task_id], state.plans.get(task_id)
        if plan is None:
            assert record.state != "succeeded", f"{task_id} succeeded without a plan"
            continue
        assert plan.state == "done", f"{task_id}: its plan is {plan.state}"
        children = [state.records.get(part.child_id or "") for part in plan.subtasks]
        if record.state == "succeeded":
            assert [child.state if child else "" for child in children] == ["succeeded"] * len(children), task_id
            assert list(record.envelope.inputs) == [part.id for part in plan.subtasks], task_id
