"""What a subtask or a delegated task inherits from the ad of the task it is part of. Pure."""

from msgspec.structs import replace

from loom.schemas.task import TaskAd


def as_part(ad: TaskAd, whole: TaskAd) -> TaskAd:
    """Return `ad` with limits and labels of the task it is part of, and with no tool that task does not allow.

    Args:
        ad: Of the part. Its own `tools_allowed` can only narrow the whole task's.
        whole: The ad of the divided or delegating task.
    """
    tools = narrowed(ad.tools_allowed, whole.tools_allowed)
    return replace(ad, limits=whole.limits, labels=whole.labels, tools_allowed=tools)


def narrowed(own: tuple[str, ...] | None, outer: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the tools that both lists allow, in the order of `own`; None stands for all tools."""
    if own is None or outer is None:
        return outer if own is None else own
    return tuple(name for name in own if name in outer)
