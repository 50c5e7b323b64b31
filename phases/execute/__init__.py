from loom.phases.execute.service import Execute

__all__ = ["Execute"]
