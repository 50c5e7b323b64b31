"""SkillNodeRegistry, by the import path of loom-agent 0.6."""

from loom.compat.skill_registry import SkillNodeRegistry

__all__ = ["SkillNodeRegistry"]
