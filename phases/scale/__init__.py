from loom.phases.scale.service import Scale

__all__ = ["Scale"]
