"""A model's answer as it comes, and why there may be none."""

from collections.abc import Iterable

from loom.agents.llm.answer_text import ThoughtSplitter
from loom.agents.port import MAX_TEXT_CHARS, deltas
from loom.schemas.events import ReasoningDelta, TextDelta
from loom.schemas.llm import StreamChunk, ToolCall, Usage

MAX_REFUSAL_CHARS = 1000
CHARS_PER_TOKEN = 32
"""More than any model packs into a token."""


class Answer:
    """Collects the pieces of one answer and returns each as what may be shown of it."""

    def __init__(self) -> None:
        self.begun = False
        """Whether a piece has come."""
        self.size = 0
        """Characters so far, those of reasoning and calls included."""
        self.refusal = ""
        self.tool_calls: list[ToolCall] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.reasoned = False
        """Whether the model has shown reasoning, in a field of its own or within its text."""
        self._splitter = ThoughtSplitter()
        self._texts: list[str] = []
        self._reasoning: list[str] = []

    @property
    def content(self) -> str:
        """The text, without thoughts."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """The reasoning that came in a field of its own."""
        return "".join(self._reasoning)

    def add(self, chunk: StreamChunk) -> list[ReasoningDelta | TextDelta]:
        """Take a piece and return what it shows."""
        self.begun = True
        self.size += len(chunk.text) + len(chunk.reasoning) + len(chunk.refusal)
        self.size += sum(len(call.id) + len(call.name) + len(call.arguments) for call in chunk.tool_calls)
        self.refusal += chunk.refusal
        self.tool_calls.extend(chunk.tool_calls)
        self.usage = chunk.usage or self.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        thoughts, text = self._splitter.add(chunk.text) if chunk.text else ("", "")
        return self._shown(chunk.reasoning + thoughts, text)

    def end(self) -> list[ReasoningDelta | TextDelta]:
        """Return what is left to show after the last piece."""
        return self._shown(*self._splitter.end())

    def _shown(self, reasoning: str, text: str) -> list[ReasoningDelta | TextDelta]:
        if text:
            self._texts.append(text)
        if reasoning:
            self.reasoned = True
        return [*(ReasoningDelta(text=each.text) for each in _pieces(reasoning)), *_pieces(text)]


def _pieces(text: str) -> Iterable[TextDelta]:
    return deltas(text) if text else ()


def most_chars(max_tokens: int | None) -> int:
    """Return how many characters a stream of at most `max_tokens` tokens may have: a longer one does not stop."""
    return MAX_TEXT_CHARS if max_tokens is None else max_tokens * CHARS_PER_TOKEN


def why_empty(answer: Answer, *, limit: int | None, by_budget: bool) -> str:
    """Return why an answer holds no text, as a clause for a message.

    Args:
        limit: Most tokens the answer could have.
        by_budget: Whether the task's token budget made that limit, not the agent's config.
    """
    if answer.refusal.strip():
        return f"it refused: {' '.join(answer.refusal.split())[:MAX_REFUSAL_CHARS]}"
    if answer.finish_reason != "length":
        return "it wrote reasoning alone" if answer.reasoned else ""
    what = "went into reasoning" if answer.reasoned else "ended before any text (hidden reasoning counts as well)"
    if limit is None:
        return f"the most tokens its server allows {what}: set AgentConfig(max_tokens=…)"
    if by_budget:
        return f"the {limit} tokens that the task's token_budget left {what}: raise token_budget"
    return f"its max_tokens ({limit}) {what}: raise AgentConfig(max_tokens=…)"
