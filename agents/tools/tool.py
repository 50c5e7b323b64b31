"""A tool, made of a Python function or of a JSON Schema and a call."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, overload

from loom.agents.tools.bodies import Body, FunctionBody, SchemaBody, TypeBody
from loom.agents.tools.context import ToolContext, ToolResult
from loom.agents.tools.lifespan import Lifespan
from loom.agents.tools.names import name_of
from loom.agents.tools.parameters import InvalidArguments
from loom.agents.tools.result import cut
from loom.agents.user_code import error_text, type_name
from loom.agents.values import NotText, to_text
from loom.bus.logs.logger import get_logger
from loom.schemas.errors import LoomError
from loom.schemas.llm import ToolDefinition
from loom.schemas.tokens import is_token

MAX_DESCRIPTION_CHARS = 1024

log = get_logger()


class Tool:
    """What a model may call: a Python function, or a call described by a JSON Schema.

    Of a function the annotations are the schema and the docstring is the description; a section `Args:` in it
    describes the parameters, as `Annotated[…, "text"]` does. Parameters and results may be of any type of
    `loom.agents.values`: dataclasses, pydantic models, Structs, NamedTuples and so on.

    Args:
        fn: Sync (runs in a thread) or async; its parameters can be given by keyword. A parameter annotated with
            ToolContext, also as `ToolContext | None`, receives it and is not a part of the schema.
        name: Letters, digits, `_` and `-`, at most 64; default: the function's name. With `schema` any text: the
            tool gets a legal name made of it, and `alias` keeps the text.
        description: For the model; default: the docstring.
        timeout_s: Seconds one call may take.
        schema: In the place of `fn`: the arguments' JSON Schema, an object of at most 64 KiB, or their type, such as a
            pydantic model. Arguments that do not fit are refused.
        call: With `schema`: a sync or async function of the arguments, a dict or an object of that type, and the
            ToolContext. With a JSON Schema the value may have the parts of a tool server's result.
        lifespan: What is open as long as the tool may be called. Several tools may share one.

    Raises:
        LoomError: The function or the schema cannot be described to a model.

    Example:
        Tool(name="files.read", schema={"type": "object", "properties": {"path": {"type": "string"}}},
             call=lambda arguments, context: session.call_tool("files.read", arguments))
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float = 30.0,
        schema: dict[str, Any] | type | None = None,
        call: Callable[[Any, ToolContext], Any] | None = None,
        lifespan: Lifespan[Any] | None = None,
    ) -> None:
        self.alias = name or str(getattr(fn, "__name__", ""))
        """The name it was given."""
        self.name = self.alias if schema is None else name_of(self.alias)
        """The name models call it by."""
        if not is_token(self.name):
            raise LoomError(f"{self.name!r} cannot name a tool: give a name of letters, digits, _ and -")
        if not timeout_s > 0:  # nor is NaN, which would upset the event loop's timers
            raise LoomError(f"tool {self.name}: timeout_s must be more than 0, not {timeout_s:g}")
        self.timeout_s = timeout_s
        self._fn = fn or call
        self._body = _body(self.name, fn, schema, call)
        self._lifespan = lifespan
        text = self._body.description if description is None else description
        self.definition = ToolDefinition(
            name=self.name, description=to_text(text)[:MAX_DESCRIPTION_CHARS], parameters=self._body.parameters
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, unchecked."""
        return self._fn(*args, **kwargs) if self._fn else None

    async def start(self) -> None:
        """Open its lifespan.

        Raises:
            LoomError: It cannot be opened.
        """
        if self._lifespan is not None:
            await self._lifespan.start()

    async def close(self) -> None:
        """Close its lifespan, unless another tool still needs it."""
        if self._lifespan is not None:
            await self._lifespan.close()

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call it with a model's `arguments`, JSON text; whatever goes wrong becomes a text for the model."""
        limit = min(self.timeout_s, context.remaining_s)
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                if self._lifespan is not None:
                    await self._lifespan.ready()
                return await self._body.run(arguments, context)
        except InvalidArguments as error:
            return self._failed(f"the arguments are not valid: {error}", context)
        except NotText as error:
            return self._failed(f"the tool's result cannot be shown: {error}", context)
        except LoomError as error:  # meant for people
            return self._failed(error_text(error), context)
        except Exception as error:  # noqa: BLE001 - a tool may raise anything; the model gets to see it
            if isinstance(error, TimeoutError) and scope.expired():
                return self._failed(f"no result within {limit:g} s", context)
            return self._failed(error_text(error), context, f"the tool raised {type_name(error)}")

    def _failed(self, reason: str, context: ToolContext, published: str | None = None) -> ToolResult:
        log.warning("tool_failed", tool=self.name, task_id=context.task_id, attempt=context.attempt, reason=reason)
        described = None if published is None else f"Error: {published}"
        return ToolResult(cut(f"Error: {reason}"), failed=True, published=described)


def _body(name: str, fn: Any, schema: Any, call: Any) -> Body:
    if fn is not None and schema is None and call is None:
        return FunctionBody(fn, name)
    if fn is not None or schema is None or call is None:
        raise LoomError(f"tool {name}: give a function, or schema= and call=")
    return SchemaBody(schema, call, name) if isinstance(schema, dict) else TypeBody(schema, call, name)


@overload
def tool(fn: Callable[..., Any], /) -> Tool: ...


@overload
def tool(*, name: str | None = None, timeout_s: float = 30.0) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    fn: Callable[..., Any] | None = None, /, *, name: str | None = None, timeout_s: float = 30.0
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a function: `@tool`, `@tool(timeout_s=5)` or `tool(function)`."""

    def make(function: Callable[..., Any]) -> Tool:
        return Tool(function, name=name, timeout_s=timeout_s)

    return make if fn is None else make(fn)


async def start_all(tools: Iterable[Tool]) -> None:
    """Start each tool; where one cannot be started, close those that were.

    Raises:
        LoomError: One cannot be opened.
    """
    started: list[Tool] = []
    try:
        for each in tools:
            await each.start()
            started.append(each)
    except BaseException:
        await close_all(started)
        raise


async def close_all(tools: Iterable[Tool]) -> None:
    """Close each tool; a lifespan logs what goes wrong as it ends."""
    for each in tools:
        await each.close()
