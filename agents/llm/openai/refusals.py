"""Reads the errors of servers: the reason, and whether another try may succeed. Pure.

Supported formats are those of OpenAI, Azure, Ollama, FastAPI, Gemini, Mistral, vLLM, LM Studio and OpenRouter.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loom.agents.llm.openai.waits import wait_s
from loom.agents.values import to_text
from loom.bus.logs.redaction import MASK, redact

MAX_REASON_CHARS = 300
MAX_DEPTH = 8
MAX_PARTS = 8
"""Maximum number of faults of a list in a message."""
TRY_AGAIN = frozenset({408, 425, 429})
"""Statuses after which another try may succeed, in addition to 500 and above."""
ACCESS_REFUSED = frozenset({401, 403})
NOT_FOUND = 404
TOO_MANY = 429
PAYMENT = 402
SERVER_ERROR = 500

_QUOTA_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "credits_exhausted"}
)
_QUOTA_WORDS = re.compile(r"exceeded your current quota|insufficient (quota|balance|credits|funds)", re.IGNORECASE)
_STATUS_OF = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "invalid_argument": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_denied": 403,
    "model_not_found": 404,
    "notfounderror": 404,
    "not_found": 404,
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "resource_exhausted": 429,
    "insufficient_quota": 429,
}
"""Type or code of an error -> HTTP status, for errors without a status."""
_NO_SUCH_PATH = re.compile(
    r"unexpected endpoint|no route|(page|url|path|route|endpoint) (was )?not found", re.IGNORECASE
)
_MASKED = re.compile(r"\S*\*{3,}[^\s.,;:]*")
"""A key masked by the server, which still contains a part of it."""


class ErrorReply(Exception):
    """A server answered with an error.

    Args:
        body: Decoded JSON, or the text.
        status_code: HTTP status; None for the status of a success.
        headers: Headers with lower-case names.
    """

    def __init__(self, body: Any, status_code: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__("the server returned an error instead of an answer")
        self.body = body
        self.status_code = status_code
        self.headers: Mapping[str, str] = {} if headers is None else headers


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The meaning of a server's error."""

    status: int | None
    """HTTP status; None if the server did not send one."""
    reason: str = ""
    """The message of the server, unchanged."""
    param: str = ""
    """The parameter that the server names as the cause."""
    code: str = ""
    wait_s: float | None = None
    quota_spent: bool = False
    no_path: bool = False
    """Whether the server does not have the requested path."""

    @property
    def retryable(self) -> bool:
        """Whether another try may succeed."""
        temporary = self.status is None or self.status in TRY_AGAIN or self.status >= SERVER_ERROR
        return temporary and not self.quota_spent and not self.no_path


def body_of(text: str) -> Any:
    """Return the body of an error as JSON, or as text if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def refusal_of(body: Any, *, status: int | None, headers: Mapping[str, str], now: float) -> Refusal:
    """Return the meaning of a server's error.

    Args:
        body: Decoded JSON, or the text.
        status: HTTP status; None for the status of a success, so that the status in the body is used.
        headers: Headers with lower-case names.
        now: Seconds since the epoch.
    """
    fields = _error_fields(body)
    code = _short_text(fields.get("code"))
    kind = _short_text(fields.get("type") or fields.get("status")).lower()
    status = status or _status(fields.get("code")) or _STATUS_OF.get(code.lower()) or _STATUS_OF.get(kind)
    reason = reason_of(body)
    retryable = status is None or status in TRY_AGAIN or status >= SERVER_ERROR
    wait = wait_s(headers if status == TOO_MANY else _wait_headers(headers), body, now) if retryable else None
    spent = bool({code.lower(), kind} & _QUOTA_CODES) or (wait is None and bool(_QUOTA_WORDS.search(reason)))
    unnamed = not isinstance(body, dict | list) or reason.strip().lower() == "not found"
    return Refusal(
        status=status,
        reason=reason,
        param=_short_text(fields.get("param")) or _location(body),
        code=code,
        wait_s=wait,
        quota_spent=spent or status == PAYMENT,
        no_path=(status == NOT_FOUND and unnamed) or bool(_NO_SUCH_PATH.search(reason)),
    )


def refusal_message(refusal: Refusal, server: str, *, versioned: bool, secrets: Iterable[str] = ()) -> str:
    """Return a message for people about a refusal, without secrets.

    Args:
        refusal: The error.
        server: Name of the server in the message.
        versioned: Whether the path of `base_url` ends with /v1.
        secrets: Values that must not appear.
    """
    status = "" if refusal.status is None else f" ({refusal.status})"
    reason = clean(refusal.reason, secrets)
    if refusal.no_path:
        hint = "check base_url" if versioned else "is /v1 missing in base_url?"
        return f"{server} does not know the path{status}{_after(reason)}; {hint}"
    if refusal.quota_spent:
        return f"{server} refuses: the quota or the credit is used up{status}{_after(reason)}"
    if refusal.status in ACCESS_REFUSED:
        return f"{server} refuses access{status}{_after(reason) or ': check the API key'}"
    if refusal.status in TRY_AGAIN:
        return f"{server} is too busy{status}{_after(reason)}"
    if refusal.status is None or refusal.status >= SERVER_ERROR:
        return f"{server} failed{status}{_after(reason)}"
    return f"{server} refused the request{status}{_after(reason)}"


def reason_of(body: Any, depth: int = 0) -> str:
    """Return the message in the body of an error; empty if there is none, or if the body is an HTML page."""
    if depth == MAX_DEPTH:
        return ""
    if isinstance(body, str):
        return "" if body.lstrip().startswith("<") else body[: 4 * MAX_REASON_CHARS].strip()
    if isinstance(body, list):
        reasons = [reason_of(part, depth + 1) for part in body[:MAX_PARTS]]
        return "; ".join(reason for reason in reasons if reason)
    if not isinstance(body, dict):
        return ""
    for name in ("error", "message", "detail", "msg", "errors", "error_description", "title"):
        reason = reason_of(body.get(name), depth + 1)
        if reason:
            break
    else:
        return ""
    metadata = body.get("metadata")  # the error of a gateway with the message of the server behind it
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    behind = reason_of(raw, depth + 1) if isinstance(raw, str | dict) else ""
    location = _path(body.get("loc"))
    return f"{location}: {reason}" if location else f"{reason}: {behind}" if behind else reason


def clean(reason: str, secrets: Iterable[str] = ()) -> str:
    """Return a reason on one line, shortened and without secrets."""
    text = redact(to_text(reason[: 4 * MAX_REASON_CHARS]), secrets)
    return " ".join(_MASKED.sub(MASK, text).split())[:MAX_REASON_CHARS]


def _after(reason: str) -> str:
    return f": {reason}" if reason else ""


def _wait_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers about waiting, without rate limit headers, which are part of every response."""
    return {name: headers[name] for name in ("retry-after", "retry-after-ms", "date") if name in headers}


def _error_fields(body: Any, depth: int = 0) -> Mapping[str, Any]:
    """Return the fields of an error object and of the error objects nested in it; inner ones take precedence."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return {}
    inner = body.get("error")
    if isinstance(inner, dict | list) and depth < MAX_DEPTH:
        return {**body, **_error_fields(inner, depth + 1)}
    return body


def _short_text(value: Any) -> str:
    """Return a text or a number as a text of at most 200 characters, and any other value as an empty text."""
    return str(value)[:200] if isinstance(value, str | int) else ""


def _status(code: Any) -> int | None:
    """Return an error code that is an HTTP error status, or None."""
    if isinstance(code, str) and code.isdecimal() and len(code) == len("400"):
        code = int(code)
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:  # noqa: PLR2004
        return code
    return None


def _location(body: Any, depth: int = 0) -> str:
    """Return the parameter named by FastAPI or Mistral: the first `loc`, without `body`."""
    if depth == MAX_DEPTH:
        return ""
    if isinstance(body, dict):
        own = _path(body.get("loc"))
        return own or next(
            (inner for name in ("error", "detail", "message") if (inner := _location(body.get(name), depth + 1))), ""
        )
    if isinstance(body, list):
        return next((inner for part in body[:MAX_PARTS] if (inner := _location(part, depth + 1))), "")
    return ""


def _path(loc: Any) -> str:
    """Return the parts of a `loc` joined by dots."""
    if not isinstance(loc, list):
        return ""
    return ".".join(str(part) for part in loc[:MAX_PARTS] if isinstance(part, str | int) and part != "body")[:200]
