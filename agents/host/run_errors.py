"""Errors by which a host ends a run that did not end by itself."""

from loom.schemas.task import TaskError

CANCELLED = TaskError(code="cancelled", message="the run was stopped")
LATE = TaskError(code="deadline_exceeded", message="the deadline passed before the run was over")
NOT_ENDED = TaskError(code="agent_failed", message="the run failed in its host, whose log has the reason")
CANCELLED_ITSELF = TaskError(code="agent_failed", message="the agent cancelled its own run")
STOPPING = TaskError(code="node_busy", message="the host is stopping")
