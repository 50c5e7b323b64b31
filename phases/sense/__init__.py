from loom.phases.sense.service import Sense

__all__ = ["Sense"]
