from loom.phases.match.service import Match

__all__ = ["Match"]
