"""A task becomes several tasks: SCALE divides it by a plan, or its agent delegates a part."""

from loom import Runtime, TaskAd, delegate
from loom.bus.bus import Bus
from loom.schemas.run import RunRequest


async def test_a_task_is_divided(phases: Bus) -> None:
    """A plan in the ad divides a task; the outputs of its subtasks are the inputs of its own run."""

    async def work(job: RunRequest) -> str:
        return f"{job.description}({', '.join(job.inputs.values())})"

    plan = [
        {"id": "a", "description": "draft"},
        {"id": "b", "description": "review", "dependencies": ["a"]},
    ]
    async with Runtime() as rt:
        rt.add_agent(work, name="worker")
        answer = await rt.submit(TaskAd(description="publish", context={"plan": plan}))

    assert answer == "publish(draft(), review(draft()))"


async def test_a_run_delegates(phases: Bus) -> None:
    """A running agent submits a task with `delegate` and continues with its answer."""

    async def manager(description: str) -> str:
        return f"in French: {await delegate(description, domain='french')}"

    def translate(description: str) -> str:
        return {"hello": "bonjour"}[description]

    async with Runtime() as rt:
        rt.add_agent(manager, name="manager", domains=["office"])
        rt.add_agent(translate, name="translator", domains=["french"])
        answer = await rt.submit(TaskAd(domain="office", description="hello"))

    assert answer == "in French: bonjour"
