"""Tokens one job has taken, and how many its next answer may take."""

from typing import Any

from loom.schemas.base import encode
from loom.schemas.events import TokenUsage
from loom.schemas.llm import Usage

BYTES_PER_TOKEN = 4
"""Where a model does not count its tokens; about right for prose in UTF-8."""


def estimate_tokens(value: Any) -> int:
    """Return about how many tokens `value`, text or messages, takes: a quarter of its JSON's bytes, at least 1."""
    return max(1, -(-len(encode(value)) // BYTES_PER_TOKEN))


def answer_limit(longest: int | None, left: int | None) -> int | None:
    """Return the most tokens an answer may take: the smaller of two limits, either of which may be absent."""
    given = [limit for limit in (longest, left) if limit is not None]
    return min(given, default=None)


class TokenUse:
    """Adds up what the answers of one job take."""

    def __init__(self) -> None:
        self.last = 0
        """Tokens of the last question and its answer: the size of the conversation by then."""
        self._prompt = 0
        self._completion = 0
        self._estimated = False

    @property
    def total(self) -> int:
        """Tokens of all questions and answers."""
        return self._prompt + self._completion

    def add(self, usage: Usage | None, question: Any, answer: Any) -> None:
        """Count an answer, by its texts where its model gives no usage."""
        if usage is None:
            self._estimated = True
            usage = Usage(prompt_tokens=estimate_tokens(question), completion_tokens=estimate_tokens(answer))
        self.last = usage.total_tokens
        self._prompt += usage.prompt_tokens
        self._completion += usage.completion_tokens

    def as_usage(self) -> TokenUsage:
        """Return the sums."""
        return TokenUsage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self.total,
            estimated=self._estimated,
        )
