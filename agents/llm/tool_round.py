"""Runs the tool calls of a turn concurrently, and answers each with one message."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loom.agents.deadline import Deadline
from loom.agents.llm.history import arguments_object
from loom.agents.tools import Tool, ToolContext, ToolResult, legal_name
from loom.agents.tools.result import as_result
from loom.agents.user_code import contain, error_fields, error_text, type_name
from loom.bus.logs.logger import get_logger
from loom.schemas.base import MAX_CONTENT_BYTES, free_json_fault
from loom.schemas.events import ToolCallEnd, ToolCallStart
from loom.schemas.llm import Message, ToolCall
from loom.schemas.run import RunRequest

log = get_logger()

WARNED_REPEATS = 3
"""Consecutive rounds with an equal call from which the call is not run; its result is a warning."""
MAX_REPEATS = 5
"""Consecutive rounds with an equal call that end the job."""
PARALLEL_TOOLS = 8
"""Calls of one round that run concurrently."""
MAX_CALLS = 64
"""Calls of one round that are run; further ones are answered by an error."""
EVENT_RESULT_CHARS = 2000
CANCEL_GRACE_S = 0.5
"""Seconds that a cancelled tool may take to end before the round ends without it."""


@dataclass(frozen=True)
class RequestedCall:
    """A tool call requested by a model."""

    written: ToolCall
    """The call as the model wrote it."""
    legal: ToolCall
    """The repaired call for the conversation."""


class ToolRounds:
    """Runs the tool calls of one job.

    Args:
        tools: Tools by name.
        tool_context: Passed to tools in their ToolContext.
    """

    def __init__(
        self, tools: Mapping[str, Tool], job: RunRequest, deadline: Deadline, tool_context: Mapping[str, Any]
    ) -> None:
        self._tools = tools
        self._job = job
        self._deadline = deadline
        self._tool_context = tool_context
        self._parallel = asyncio.Semaphore(PARALLEL_TOOLS)
        self._calls = 0  # in all rounds
        self._rounds: dict[tuple[str, str], int] = {}  # call of the last round -> consecutive rounds with it

    def count_repeats(self, calls: Sequence[ToolCall]) -> list[str]:
        """Count a round with `calls`, and return the tools whose calls are repeated in too many consecutive rounds."""
        self._rounds = {call: self._rounds.get(call, 0) + 1 for call in {_identity(call) for call in calls}}
        return sorted({name for (name, _), rounds in self._rounds.items() if rounds >= MAX_REPEATS})

    async def run(
        self, calls: Sequence[RequestedCall], conversation: list[Message], *, cut: bool = False
    ) -> AsyncGenerator[ToolCallStart | ToolCallEnd, None]:
        """Run `calls`, yield their starts and ends, and add their results to `conversation` in the order of the calls.

        Args:
            calls: The calls of one turn.
            conversation: The messages of the job.
            cut: Whether the turn ended at its token limit, which explains invalid arguments.

        Raises:
            DeadlineExceeded: There is no time left.
        """
        running: dict[asyncio.Task[tuple[ToolResult, float]], RequestedCall] = {}
        try:
            for place, call in enumerate(calls):
                yield _start(call.legal)
                self._calls += 1
                running[asyncio.create_task(self._result(call, place, self._calls, cut=cut))] = call
            pending = set(running)
            while pending:
                ended, pending = await asyncio.wait(
                    pending, timeout=self._deadline.left, return_when=asyncio.FIRST_COMPLETED
                )
                if not ended:
                    self._deadline.check()
                for task in ended:
                    yield _end(running[task].legal, *_outcome(task))
        finally:
            unfinished = [task for task in running if task.cancel()]
            if unfinished:
                await asyncio.wait(unfinished, timeout=CANCEL_GRACE_S)
        conversation.extend(
            Message(role="tool", content=_outcome(task)[0].text, tool_call_id=call.legal.id)
            for task, call in running.items()
        )

    async def _result(
        self, requested: RequestedCall, place: int, number: int, *, cut: bool
    ) -> tuple[ToolResult, float]:
        """Return the result of a call and its duration in milliseconds."""
        call = requested.written
        refusal = self._refusal(call, place)
        if refusal:
            return ToolResult(f"Error: {refusal}", failed=True), 0.0
        async with self._parallel:
            started = time.monotonic()
            context = ToolContext(
                task_id=self._job.task_id,
                attempt=self._job.attempt,
                remaining_s=self._deadline.left,
                call=number,
                call_id=requested.legal.id,
                tool_context=self._tool_context,
            )
            result = await _run(self._tools[legal_name(call.name)], call.arguments, context)
            took_ms = (time.monotonic() - started) * 1000
        if cut and result.failed and arguments_object(call.arguments) is None:
            result = ToolResult(f"{result.text}; the turn was cut at its token limit", failed=True)
        return result, took_ms

    def _refusal(self, call: ToolCall, place: int) -> str:
        """Return why a call is not run; empty if it is run."""
        if legal_name(call.name) not in self._tools:
            return f"there is no tool of that name; there are: {', '.join(self._tools) or 'none'}"
        if place >= MAX_CALLS:
            return f"not run: one turn may make at most {MAX_CALLS} calls; make the others in the next one"
        rounds = self._rounds.get(_identity(call), 0)
        if rounds >= WARNED_REPEATS:
            return f"not run: the same call {rounds} times in a row; use its earlier result, or do something else"
        return ""


async def _run(tool: Tool, arguments: str, context: ToolContext) -> ToolResult:
    """Run a tool, whose class may be a user's; an exception becomes a text for the model."""
    try:
        with contain():
            value: Any = await tool.run(arguments, context)
            return value if isinstance(value, ToolResult) else as_result(value)
    except Exception as error:  # noqa: BLE001 - a user's class may raise anything; the model gets the error
        log.warning("tool_failed", tool=tool.name, task_id=context.task_id, **error_fields(error))
        published = f"Error: the tool raised {type_name(error)}"
        return ToolResult(f"Error: {error_text(error)}", failed=True, published=published)


def _outcome(task: "asyncio.Task[tuple[ToolResult, float]]") -> tuple[ToolResult, float]:
    """Return the result and the duration of an ended call; the tool may have cancelled its own task."""
    if task.cancelled():
        return ToolResult("Error: the tool cancelled itself", failed=True), 0.0
    return task.result()


def _identity(call: ToolCall) -> tuple[str, str]:
    """Return the name and the normalized arguments of a call, which are equal for equal calls."""
    try:
        value = msgspec.json.decode(call.arguments)
        return call.name, msgspec.json.encode(value, order="sorted").decode()
    except (ValueError, RecursionError):
        return call.name, call.arguments


def _start(call: ToolCall) -> ToolCallStart:
    arguments = arguments_object(call.arguments) or {}
    sendable = free_json_fault(arguments, max_bytes=MAX_CONTENT_BYTES) is None
    return ToolCallStart(tool_call_id=call.id, name=call.name, input=arguments if sendable else {})


def _end(call: ToolCall, result: ToolResult, duration_ms: float) -> ToolCallEnd:
    return ToolCallEnd(
        tool_call_id=call.id,
        name=call.name,
        result=(result.text if result.published is None else result.published)[:EVENT_RESULT_CHARS],
        failed=result.failed,
        duration_ms=duration_ms,
    )
