import pytest
from support.phase_harness import Asker, Stage
from support.wait import until

from loom.bus.rewards import RewardBus
from loom.schemas.base import new_id
from loom.schemas.learning.calibration import BIAS, Calibration
from loom.schemas.learning.lease import Lease
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskAd


async def done(stage: Stage, *estimates: float, domain_token: str = "code") -> None:
    """Tasks with this estimated complexity, all of which took no effort at all."""
    for estimated in estimates:
        task = new_id()
        await RewardBus(bus=stage.bus).publish(
            Reward(
                reward_id=f"{task}:1:rules",
                task_id=task,
                attempt=1,
                node_id="n1",
                domain_token=domain_token,
                score=1.0,
                ended_at=1.0,
                estimated=estimated,
            )
        )  # fmt: skip


async def known(stage: Stage, count: int) -> Calibration:
    async def stored() -> Calibration | None:
        entry = await stage.bus.bucket("tuning", Calibration).get(f"{BIAS}code")
        return entry.value if entry and entry.value.count >= count else None

    found = await until(stored, within_s=20, what=f"{count} tasks are calibrated by")
    assert found is not None
    return found


async def sensed(stage: Stage, **facts: float) -> tuple[float, str]:
    """Return SENSE's estimate of the complexity of a task of one word, and its note."""
    ad = TaskAd(task_id=new_id(), domain="code", description="word " * 40, **facts)  # type: ignore[arg-type]
    await Asker(stage.bus).ask(stage.bus.subjects.submit, ad)
    envelope = await stage.seen("task", phase="match", task_id=ad.task_id, within_s=20)
    return envelope.spec.complexity, envelope.spec.note


async def test_estimates_of_sense_are_corrected_by_the_measured_complexity_of_tasks(stage: Stage) -> None:
    await stage.bus.bucket("tuning", Lease).create("apoptosis", Lease(holder="x", until=0))  # another's affair
    await stage.phase("adapt")
    await stage.phase("sense")
    await done(stage, 0.2, 0.2)
    await known(stage, 2)
    assert await sensed(stage) == (0.2, "")

    await done(stage, 0.2)
    bias = (await known(stage, 3)).bias
    assert bias == pytest.approx(-0.2 * (1 - 0.7**3))

    async def corrected() -> bool:
        return await sensed(stage) == (round(0.2 + bias, 4), "complexity 0.20 by itself, -0.13 by 3 tasks before")

    await until(corrected, within_s=20, what="SENSE has the correction")
    assert await sensed(stage, estimated_complexity=0.2) == (0.2, "")


async def test_replicas_that_count_the_same_tasks_count_them_once(stage: Stage) -> None:
    first = await stage.phase("adapt")
    await stage.phase("adapt")
    for count in range(1, 8):
        await done(stage, 0.5)
        await known(stage, count)
    await first.close()
    await stage.phase("adapt")  # the new replica reads the whole stream again
    await done(stage, 0.5)
    last = await known(stage, 8)
    assert (last.count, last.last_seq) == (8, 8)
    assert last.bias == pytest.approx(-0.5 * (1 - 0.7**8))


async def test_domains_past_the_limit_leave_no_key_not_even_after_a_restart(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.phases.adapt.calibration_writer.MAX_DOMAINS", 2)
    first = await stage.phase("adapt")
    for domain_token in ("made-up-1", "code", "made-up-2"):
        await done(stage, 0.5, domain_token=domain_token)
    await done(stage, 0.5)
    await known(stage, 2)
    await first.close()
    await stage.phase("adapt")  # the new replica reads the whole stream again
    await done(stage, 0.5, domain_token="made-up-3")
    await done(stage, 0.5)
    await known(stage, 3)

    kept = [await stage.bus.bucket("tuning", Calibration).get(f"{BIAS}made-up-{n}") for n in (1, 2, 3)]
    assert [entry is not None for entry in kept] == [True, False, False]
