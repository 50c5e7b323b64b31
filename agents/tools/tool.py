"""A tool made from a Python function, or from a JSON Schema and a callable."""

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
    """Describes a function or a call to a model, and runs it with the arguments of the model.

    The annotations of a function are the schema, and its docstring is the description. An `Args:` section, or
    `Annotated[…, "text"]`, describes the parameters. Parameters and results may have any type of `loom.agents.values`,
    such as dataclasses, pydantic models, Structs and NamedTuples.

    Args:
        fn: A sync function (run in a thread) or an async one, without positional-only parameters. A parameter
            annotated with ToolContext or `ToolContext | None` receives the context and is not part of the schema.
        name: Up to 64 letters, digits, `_` and `-`; default: the name of the function. With `schema` any text, which
            is kept as `alias` and converted to a legal name.
        description: Description for the model; default: the docstring.
        timeout_s: Seconds that a call may take.
        schema: Replaces `fn`: a JSON Schema of the arguments (an object, at most 64 KiB), or their type, such as a
            pydantic model. Invalid arguments are refused.
        call: Required with `schema`: a sync or async function of the arguments and the ToolContext. The arguments are
            a dict, or an object of the type. With a JSON Schema, the result may have the parts of a tool server.
        lifespan: A resource that is open while the tool may be called. Several tools may share one.

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
        """The name given to the constructor."""
        self.name = self.alias if schema is None else name_of(self.alias)
        """The name for models."""
        if not is_token(self.name):
            raise LoomError(f"{self.name!r} cannot name a tool: give a name of letters, digits, _ and -")
        if not timeout_s > 0:  # NaN, which breaks timers of the event loop, is refused as well
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
        """Call the function without checks."""
        return self._fn(*args, **kwargs) if self._fn else None

    async def start(self) -> None:
        """Open the lifespan of the tool.

        Raises:
            LoomError: The lifespan cannot be opened.
        """
        if self._lifespan is not None:
            await self._lifespan.start()

    async def close(self) -> None:
        """Close the lifespan of the tool, unless another tool still uses it."""
        if self._lifespan is not None:
            await self._lifespan.close()

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the function with the arguments of a model, which are JSON text; errors become a text for the model."""
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
        except LoomError as error:  # its message contains no secrets
            return self._failed(error_text(error), context)
        except Exception as error:  # noqa: BLE001 - a tool may raise anything; the model gets the error
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
    """Make a Tool from a function: `@tool`, `@tool(timeout_s=5)` or `tool(function)`."""

    def make(function: Callable[..., Any]) -> Tool:
        return Tool(function, name=name, timeout_s=timeout_s)

    return make if fn is None else make(fn)


async def start_all(tools: Iterable[Tool]) -> None:
    """Start all tools; if one fails, close those that were started.

    Raises:
        LoomError: The lifespan of a tool cannot be opened.
    """
    started: list[Tool] = []
    try:
        for item in tools:
            await item.start()
            started.append(item)
    except BaseException:
        await close_all(started)
        raise


async def close_all(tools: Iterable[Tool]) -> None:
    """Close all tools; lifespans log their errors."""
    for item in tools:
        await item.close()
