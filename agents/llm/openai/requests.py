"""Builds requests of OpenAI's chat completions API. Pure."""

from typing import Any

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.answers import REASONING_DETAILS
from loom.agents.llm.openai.compatibility import Compatibility
from loom.schemas.base import encode
from loom.schemas.llm import CompletionParams, Message, ToolDefinition

ONLY_WITH_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})
"""Fields that servers refuse in a request without tools."""


def request_of(
    config: AgentConfig, params: CompletionParams, compatibility: Compatibility, *, stream: bool
) -> dict[str, Any]:
    """Return the body of a request with `extra` merged in, without settings of None and without refused parameters."""
    configured: dict[str, Any] = {
        "model": config.model,
        "temperature": params.temperature,
        "max_tokens": params.max_tokens,
        "reasoning_effort": config.reasoning_effort,
        "stream": stream or None,
        "stream_options": {"include_usage": True} if stream else None,
        "response_format": _response_format(params),
    }
    if params.tools:
        configured |= {"tools": [_tool(definition) for definition in params.tools], "tool_choice": config.tool_choice}
    configured |= config.extra
    unused = frozenset() if params.tools else ONLY_WITH_TOOLS
    sent = {name: value for name, value in configured.items() if value is not None and name not in unused}
    request = _compatible(sent, compatibility)
    request["messages"] = _messages(params, compatibility, request.get("response_format"))
    return request


def _compatible(request: dict[str, Any], compatibility: Compatibility) -> dict[str, Any]:
    """Return the request in a form that the model accepts."""
    if "max_tokens" in request and (compatibility.completion_tokens or "max_completion_tokens" in request):
        request.setdefault("max_completion_tokens", request.pop("max_tokens"))
        request.pop("max_tokens", None)
    if compatibility.json_object and "response_format" in request:
        request["response_format"] = {"type": "json_object"}
    return {name: value for name, value in request.items() if name not in compatibility.left_out}


def _response_format(params: CompletionParams) -> dict[str, Any] | None:
    if params.json_schema is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": params.json_schema}}


def _messages(params: CompletionParams, compatibility: Compatibility, response_format: Any) -> list[dict[str, Any]]:
    """Return the messages; they describe the schema if the response format does not contain it."""
    messages = [_message(message, compatibility) for message in params.messages]
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if params.json_schema is not None and kind != "json_schema":
        schema = encode(params.json_schema).decode()
        _add_system(messages, f"Answer only with JSON that is valid under this JSON Schema:\n{schema}")
    return _without_system(messages) if compatibility.system_as_user else messages


def _add_system(messages: list[dict[str, Any]], text: str) -> None:
    """Append a text to the system prompt."""
    if messages and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each system prompt prepended to the next user message."""
    result: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            result.append({**message, "content": "\n\n".join((*waiting, message["content"]))})
            waiting = []
        else:
            result.append(message)
    return [*result, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else result


def _message(message: Message, compatibility: Compatibility) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                **{name: value for name, value in call.extra.items() if name != REASONING_DETAILS},
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
        details = [call.extra[REASONING_DETAILS] for call in message.tool_calls if REASONING_DETAILS in call.extra]
        if details:
            body[REASONING_DETAILS] = details[0]
    if message.role == "tool":
        body["tool_call_id"] = message.tool_call_id
    if message.role == "assistant" and compatibility.reasoning_content and (message.reasoning or message.tool_calls):
        body["reasoning_content"] = message.reasoning
    return body


def _tool(definition: ToolDefinition) -> dict[str, Any]:
    parameters = definition.parameters or {"type": "object", "properties": {}}
    function = {"name": definition.name, "description": definition.description, "parameters": parameters}
    return {"type": "function", "function": function}
