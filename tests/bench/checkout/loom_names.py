"""The parts of loom that the benchmark's processes use, under the names of this checkout or of commit b576095.

Every program of this folder runs with the Python of the checkout that it measures, and imports loom from here only.
"""

try:
    from loom.agents.host.node_host import NodeHost
    from loom.bus.bus import Bus
    from loom.bus.task_client import publish
    from loom.runner.log_output import configure as configure_logs
    from loom.runner.services import running_phases
except ImportError:  # commit b576095
    from loom.agents.host import NodeHost  # type: ignore[attr-defined,no-redef]
    from loom.bus.client import Bus  # type: ignore[import-not-found,no-redef]
    from loom.bus.tasks import publish  # type: ignore[import-not-found,no-redef]
    from loom.runner.cluster import running_phases  # type: ignore[import-not-found,no-redef]
    from loom.runner.logs import configure as configure_logs  # type: ignore[import-not-found,no-redef]

from loom.runner.settings import from_environment
from loom.schemas.envelope import Phase
from loom.schemas.task import TaskAd
from loom.types import AgentNode, CapabilityProfile

__all__ = [
    "AgentNode",
    "Bus",
    "CapabilityProfile",
    "NodeHost",
    "Phase",
    "TaskAd",
    "configure_logs",
    "from_environment",
    "publish",
    "running_phases",
]
