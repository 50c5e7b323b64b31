"""Counts the tokens of a job, and limits the tokens of its next answer."""

from typing import Any

from loom.schemas.base import encode
from loom.schemas.events import TokenUsage
from loom.schemas.llm import Usage

BYTES_PER_TOKEN = 4
"""Estimate for models that do not report tokens; about right for prose in UTF-8."""


def estimate_tokens(value: Any) -> int:
    """Return the estimated tokens of text or messages: a quarter of the bytes of the JSON, at least 1."""
    return max(1, -(-len(encode(value)) // BYTES_PER_TOKEN))


def answer_limit(longest: int | None, left: int | None) -> int | None:
    """Return the token limit of an answer: the smaller of two limits, each of which may be None."""
    given = [limit for limit in (longest, left) if limit is not None]
    return min(given, default=None)


class TokenUse:
    """Adds up the tokens of the answers of one job."""

    def __init__(self) -> None:
        self.last = 0
        """Tokens of the last request and its answer, which is the size of the conversation."""
        self._prompt = 0
        self._completion = 0
        self._estimated = False

    @property
    def total(self) -> int:
        """Tokens of all requests and answers."""
        return self._prompt + self._completion

    def add(self, usage: Usage | None, request: Any, answer: Any) -> None:
        """Count an answer; if the model reports no usage, estimate it from the texts."""
        if usage is None:
            self._estimated = True
            usage = Usage(prompt_tokens=estimate_tokens(request), completion_tokens=estimate_tokens(answer))
        self.last = usage.total_tokens
        self._prompt += usage.prompt_tokens
        self._completion += usage.completion_tokens

    def as_usage(self) -> TokenUsage:
        """Return the sums as a TokenUsage."""
        return TokenUsage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self.total,
            estimated=self._estimated,
        )
