"""What the functions and objects users hand over as agents take."""

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from loom.agents.job import Job
from loom.schemas.errors import LoomError
from loom.schemas.run import RunRequest

JOB_NAMES = frozenset({"job", "request", "req", "run"})
"""A parameter of such a name and without an annotation gets the job; any other name gets the text."""
STREAM = "`async def stream(self, job): yield TextDelta(text=…); yield Done(content=…)`"
WRAP = "`async def answer(text: str): return (await it.ainvoke(…))…`"


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function, of what a `partial` calls, or of an object's class."""
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    return name if isinstance(name, str) else type(fn).__name__


def takes_text(fn: Callable[..., Any]) -> bool:
    """Return whether the one argument of `fn` is the task's text, and not the job.

    Its annotation decides: text for `str` in any form (`str | None`, `Annotated[str, …]`), the job for what a Job may
    be. Without an annotation its name does.

    Raises:
        LoomError: `fn` does not take exactly one argument, hides its parameters, or wants another type.
    """
    name = name_of(fn)
    parameters = list(_signature(fn, name).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not positional or len(required) > 1 or (required and required[0].kind is inspect.Parameter.KEYWORD_ONLY):
        raise LoomError(f"{name} must take one argument: the text of the task (str) or the job (RunRequest)")
    first = required[0] if required else positional[0]
    if first.annotation in (first.empty, Any):
        return first.name not in JOB_NAMES
    if is_text(first.annotation):
        return True
    if not may_be_job(first.annotation):
        raise LoomError(
            f"{name} takes a {_shown(first.annotation)}: annotate its argument with str for the text of the task, or "
            "with Job, whose context has the values of the ad"
        )
    return False


def is_text(annotation: Any) -> bool:
    """Return whether an annotation means text, the job not being among its alternatives."""
    if annotation is str:
        return True
    if isinstance(annotation, str):  # postponed, and naming what cannot be found: read as it is written
        words = annotation.replace("|", " ").replace("[", " ").replace("]", " ").replace(",", " ").split()
        return "str" in words and RunRequest.__name__ not in words
    origin = get_origin(annotation)
    if origin is Annotated:
        return is_text(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        kinds = get_args(annotation)
        takes_job = any(isinstance(kind, type) and issubclass(kind, RunRequest) for kind in kinds)
        return not takes_job and any(is_text(kind) for kind in kinds)
    return isinstance(annotation, type) and issubclass(annotation, str)


def may_be_job(annotation: Any) -> bool:
    """Return whether a Job may be meant by an annotation; True where that cannot be known."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return may_be_job(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return any(may_be_job(kind) for kind in get_args(annotation))
    kind = origin or annotation
    if kind in (None, types.NoneType, Literal) or is_typeddict(kind):
        return False
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return issubclass(Job, kind) or issubclass(kind, RunRequest)


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def check_stream(agent: Any) -> None:
    """Return if an object's `stream` may be that of an agent.

    Raises:
        LoomError: It cannot be: it belongs to another framework, is not an async generator, or takes other arguments.
    """
    kind, stream = type(agent).__name__, agent.stream
    if callable(getattr(agent, "ainvoke", None)) and not inspect.isasyncgenfunction(stream):
        raise LoomError(
            f"a {kind} is a LangChain or LangGraph object, whose stream takes other arguments and yields other things "
            f"than an agent's: add a function that calls it, such as {WRAP}"
        )
    if not callable(stream):
        raise LoomError(f"stream of a {kind} is not a method: make it {STREAM}")
    if inspect.isgeneratorfunction(stream):
        raise LoomError(f"stream of a {kind} is a sync generator: make it {STREAM}, or add a function that yields text")
    if inspect.iscoroutinefunction(stream):
        raise LoomError(f"stream of a {kind} is a coroutine: it must yield and not return; make it {STREAM}")
    try:
        inspect.signature(stream).bind(None)
    except TypeError:
        raise LoomError(f"stream of a {kind} must take one argument, the job: make it {STREAM}") from None
    except ValueError:
        return  # of native code, which may hide its parameters


def _signature(fn: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except (TypeError, ValueError) as error:
        hidden: Exception = error
    except Exception as error:  # noqa: BLE001 - a postponed annotation is code, which may raise anything
        hidden = error
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        raise LoomError(f"{name} hides its parameters: wrap it in a function of one argument") from hidden
