"""The AmoebaLoop of loom-agent 0.6 on the session of a Runtime."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from loom.agents.llm.guarded_provider import GuardedProvider
from loom.compat.amoeba_loop import AmoebaLoop
from loom.compat.cluster_manager import ClusterManager
from loom.compat.lifecycle import LifecycleManager
from loom.compat.planner import TaskPlanner
from loom.compat.reward_formulas import RewardBus
from loom.compat.skill_registry import SkillNodeRegistry
from loom.runner.session import Session
from loom.runner.session_owner import SessionOwner
from loom.schemas.llm import AnyProvider


class RuntimeLoop(AmoebaLoop):
    """Uses the session of its Runtime while that is open, otherwise its own.

    Args:
        sessions: The Runtime's.
        store: The Runtime's, for a session of its own.
    """

    def __init__(
        self,
        sessions: SessionOwner,
        cluster: ClusterManager,
        reward_bus: RewardBus,
        lifecycle: LifecycleManager,
        skill_registry: SkillNodeRegistry,
        llm: AnyProvider,
        *,
        store: Path | None = None,
    ) -> None:
        super().__init__(
            cluster, reward_bus, lifecycle, TaskPlanner(GuardedProvider(llm)), skill_registry, llm, store=store
        )
        self._runtime = sessions

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        if self._runtime.owner is not None:
            yield await self._runtime.open()
        else:
            async with super()._session() as session:
                yield session
