"""The limits that a subtask or a delegated task inherits from the ad of its parent task. Pure."""

from msgspec.structs import replace

from loom.schemas.task import TaskAd


def inherited_ad(ad: TaskAd, parent: TaskAd) -> TaskAd:
    """Return `ad` with the limits and labels of its parent task, and with only the tools that the parent task allows.

    Args:
        ad: Of the child. Its own `tools_allowed` can only narrow that of the parent.
        parent: The ad of the divided or delegating task.
    """
    tools = intersect_tools(ad.tools_allowed, parent.tools_allowed)
    return replace(ad, limits=parent.limits, labels=parent.labels, tools_allowed=tools)


def intersect_tools(own: tuple[str, ...] | None, outer: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the tools that both lists allow, in the order of `own`; None stands for all tools."""
    if own is None or outer is None:
        return outer if own is None else own
    return tuple(name for name in own if name in outer)
