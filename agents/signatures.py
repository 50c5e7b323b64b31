"""Checks the signatures of functions and objects that users give as agents."""

import inspect
import types
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from loom.agents.job import Job
from loom.schemas.errors import LoomError
from loom.schemas.run import RunRequest

JOB_NAMES = frozenset({"job", "request", "req", "run"})
"""Names of an unannotated parameter that gets the job; a parameter with another name gets the text."""
STREAM = "`async def stream(self, job): yield TextDelta(text=…); yield Done(content=…)`"
WRAP = "`async def answer(text: str): return (await it.ainvoke(…))…`"


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function, of the function of a `partial`, or of an object's class."""
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    return name if isinstance(name, str) else type(fn).__name__


def takes_text(fn: Callable[..., Any]) -> bool:
    """Return whether the argument of `fn` is the text of the task, and not the job.

    The annotation decides: `str` in any form (`str | None`, `Annotated[str, …]`) means text, a type that a Job can be
    means the job. Without an annotation, the name of the parameter decides.

    Raises:
        LoomError: `fn` does not take exactly one argument, hides its parameters, or takes another type.
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
    """Return whether an annotation means text and does not include the job."""
    if annotation is str:
        return True
    if isinstance(annotation, str):  # postponed, and its names cannot be resolved
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
    """Return whether an annotation may mean a Job; True if that is unknown."""
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
    """Check that an object's `stream` has the form of an agent's.

    Raises:
        LoomError: `stream` belongs to another framework, is not an async generator, or takes other arguments.
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
        return  # native code may hide its parameters


def accepts_run_context(agent: Any) -> bool:
    """Return whether an agent's `stream` has a parameter `run_context`."""
    stream = agent.stream
    try:
        return "run_context" in _parameter_names(getattr(stream, "__func__", stream))
    except (TypeError, ValueError):
        return False  # native code may hide its parameters


@lru_cache(maxsize=64)
def _parameter_names(fn: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of `fn`; cached, because every run needs them."""
    return frozenset(inspect.signature(fn).parameters)


def _signature(fn: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except (TypeError, ValueError) as error:
        hidden: Exception = error
    except Exception as error:  # noqa: BLE001 - a postponed annotation is code and may raise anything
        hidden = error
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        raise LoomError(f"{name} hides its parameters: wrap it in a function of one argument") from hidden
