from loom.phases.evaluate.service import Evaluate

__all__ = ["Evaluate"]
