from loom.phases.adapt.service import Adapt

__all__ = ["Adapt"]
