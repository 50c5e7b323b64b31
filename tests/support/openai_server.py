"""A small HTTP server that speaks OpenAI's chat completions API, for tests that need a model.

Unscripted it is a well-behaved model: it repeats the last user message, and answers a question with a JSON schema
by a small value of that schema. A script makes it do anything else, once per reply.

    async with OpenAIServer() as server:          # in this event loop
        server.script(Reply(status=429), Reply(text="hello"))
        provider = OpenAIProvider(AgentConfig(api_key="k", base_url=server.base_url))

    with OpenAIServer() as server: ...            # in a background thread
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

PIECE_CHARS = 8
SILENCE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. With `status` other than 200, `body` and `headers` are sent as they are."""

    text: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    """(name, arguments as JSON text)."""
    finish_reason: str | None = "auto"
    """auto: stop or tool_calls; None: a stream just ends."""
    usage: tuple[int, int] | str | None = "auto"
    """(prompt tokens, completion tokens); auto: counted from the texts; None: left out."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    """Sent raw instead of a completion, when not empty or `status` is not 200."""
    delay_s: float = 0.0
    """Before the first byte."""
    pause_s: float = 0.0
    """Before each piece of a stream."""
    cut_after: int | None = None
    """The connection breaks after so many events of a stream, or before anything else."""
    silent_after: int | None = None
    """Events of a stream after which the server sends nothing more."""
    no_choices: bool = False
    """A whole answer has none; a stream begins with an event without."""
    events: tuple[str, ...] = ()
    """JSON texts, sent raw as a stream's events when there are any; such a stream just ends, unless it is `done`."""
    done: bool = False
    """Whether `[DONE]` follows `events`."""


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(self.body["messages"])


Answerer = Callable[[Request], Reply]

ERROR_EVENT = '{"error": {"message": "the engine stopped", "type": "server_error"}}'
"""An error event inside a stream."""


class OpenAIServer:
    """`POST <base_url>/chat/completions` on a free port of 127.0.0.1."""

    def __init__(self, answer: Answerer | None = None) -> None:
        self.answer: Answerer = answer or well_behaved
        """Asked when the script is empty."""
        self.requests: list[Request] = []
        self.disconnects = 0
        """Clients that went away before their answer was complete."""
        self.connections = 0
        self.open_connections = 0
        self._script: deque[Reply | Answerer] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, *replies: Reply | Answerer) -> None:
        """Answer the next requests by these, in order."""
        self._script.extend(replies)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def __enter__(self) -> Self:
        started = threading.Event()

        async def main() -> None:
            async with self:
                loop, stopping = asyncio.get_running_loop(), asyncio.Event()
                self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
                started.set()
                await stopping.wait()

        self._thread = threading.Thread(target=asyncio.run, args=(main(),), name="openai-server", daemon=True)
        self._thread.start()
        assert started.wait(10), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._stop()
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            while request := await _read_request(reader):
                self.requests.append(request)
                if not await self._respond(request, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.disconnects += 1
        except asyncio.CancelledError:
            pass  # the server stops; asyncio would log a cancelled connection as a failure
        finally:
            self._tasks.discard(task)
            self.open_connections -= 1
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _respond(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send the next reply; whether the connection is still good."""
        chosen = self._script.popleft() if self._script else self.answer
        reply = chosen if isinstance(chosen, Reply) else chosen(request)
        await _wait(reply.delay_s, reader)
        if reply.cut_after is not None and (reply.cut_after == 0 or not request.body.get("stream")):
            writer.transport.abort()
            return False
        if reply.status != 200 or reply.body:
            _write_whole(writer, reply.status, reply.body, reply.headers)
        elif request.body.get("stream"):
            return await _stream(request, reply, reader, writer)
        else:
            _write_whole(writer, 200, json.dumps(_completion(request, reply)), reply.headers)
        await writer.drain()
        return True


def text_event(text: str) -> str:
    """Return an event with a piece of text, for `Reply.events`."""
    return json.dumps(_event([{"index": 0, "delta": {"content": text}, "finish_reason": None}]))


def delta_event(delta: Any, finish_reason: str | None = None, **more: Any) -> str:
    """Return an event with any delta, for `Reply.events`."""
    return json.dumps(_event([{"index": 0, "delta": delta, "finish_reason": finish_reason, **more}]))


def message_body(message: Any, finish_reason: str | None = "stop", **more: Any) -> str:
    """Return a whole answer with any message, for `Reply.body`."""
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], **more})


def well_behaved(request: Request) -> Reply:
    """Repeat the last user message, or answer by a value of the schema that was asked for."""
    wanted = request.body.get("response_format")
    if wanted:
        return Reply(text=json.dumps(sample(wanted["json_schema"]["schema"])))
    texts = [message["content"] for message in request.messages if message["role"] == "user"]
    return Reply(text=f"You wrote: {texts[-1] if texts else ''}")


def sample(schema: dict[str, Any]) -> Any:
    """A small value of `schema`: the first of each choice, the middle of each range."""
    for key in ("enum", "anyOf", "oneOf"):
        if key in schema:
            return schema[key][0] if key == "enum" else sample(schema[key][0])
    kind = schema.get("type")
    if kind == "object":
        return {name: sample(part) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema["items"])] if "items" in schema else []
    if kind == "number":
        return (schema.get("minimum", 0) + schema.get("maximum", 1)) / 2
    plain: dict[str | None, Any] = {"integer": schema.get("minimum", 1), "boolean": True, "null": None}
    return plain.get(kind, schema.get("const", "general"))


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request; None when the client has hung up between two."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(path=first.split(" ")[1], headers=headers, body=json.loads(body or b"{}"))


async def _wait(seconds: float, reader: asyncio.StreamReader) -> None:
    """Wait, unless the client hangs up meanwhile."""
    if not seconds:
        return
    with suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)
        raise ConnectionResetError("the client went away")


def _write_whole(writer: asyncio.StreamWriter, status: int, body: str, headers: dict[str, str]) -> None:
    raw = body.encode()
    content = "application/json" if body.startswith("{") else "text/html"
    fields = {"Content-Type": content, "Content-Length": str(len(raw)), **headers}
    writer.write(_head(status, fields) + raw)


def _head(status: int, fields: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode()


async def _stream(request: Request, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(_head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **reply.headers}))
    for n, event in enumerate(reply.events or [json.dumps(event) for event in _events(request, reply)]):
        if n == reply.cut_after:
            await writer.drain()
            writer.transport.abort()
            return False
        await _wait(SILENCE_S if n == reply.silent_after else reply.pause_s, reader)
        _write_event(writer, event)
        await writer.drain()
    if reply.done if reply.events else reply.finish_reason is not None:
        _write_event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def _write_event(writer: asyncio.StreamWriter, data: str) -> None:
    raw = f"data: {data}\n\n".encode()
    writer.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")


def _events(request: Request, reply: Reply) -> list[dict[str, Any]]:
    """The events of a streamed completion."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": reply.text[at : at + PIECE_CHARS]} for at in range(0, len(reply.text), PIECE_CHARS)]
    for n, (name, arguments) in enumerate(reply.tool_calls):
        half = len(arguments) // 2
        start = {"index": n, "id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": ""}}
        deltas.append({"tool_calls": [start]})
        for part in (arguments[:half], arguments[half:]):
            deltas.append({"tool_calls": [{"index": n, "function": {"arguments": part}}]})
    events = [_event([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    if reply.no_choices:
        events.insert(0, _event([]))
    if reply.finish_reason is not None:
        events.append(_event([{"index": 0, "delta": {}, "finish_reason": _reason(reply)}]))
        usage = _usage(request, reply)
        if usage and (request.body.get("stream_options") or {}).get("include_usage"):
            events.append({**_event([]), "usage": usage})
    return events


def _event(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "test", "choices": choices}


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(reply.tool_calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": _reason(reply)}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "test"}
    return {**whole, "choices": [] if reply.no_choices else [choice], "usage": _usage(request, reply)}


def _reason(reply: Reply) -> str | None:
    if reply.finish_reason != "auto":
        return reply.finish_reason
    return "tool_calls" if reply.tool_calls else "stop"


def _usage(request: Request, reply: Reply) -> dict[str, int] | None:
    if reply.usage is None:
        return None
    if isinstance(reply.usage, tuple):
        asked, answered = reply.usage
    else:
        asked = len(json.dumps(request.messages)) // 4 + 1
        answered = (len(reply.text) + sum(len(arguments) for _, arguments in reply.tool_calls)) // 4 + 1
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
