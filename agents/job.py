"""The job that user code gets for a run, and the costs that user code reports."""

import math
import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from loom.agents.run_context import current_run
from loom.schemas.base import MAX_INT, total
from loom.schemas.errors import AgentFailed, BudgetExceeded
from loom.schemas.events import Done, TokenUsage
from loom.schemas.run import RunRequest

MAX_USD = 1e9

_lock = threading.Lock()
"""Held while costs are added, because a sync agent may report from several threads."""


class Spent(msgspec.Struct):
    """The tokens and US dollars that a run has reported."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return total(self.prompt_tokens, self.completion_tokens)

    def add(self, prompt_tokens: int, completion_tokens: int, usd: float) -> None:
        """Add costs; sums stop at the largest numbers that a message can hold."""
        with _lock:
            self.prompt_tokens = total(self.prompt_tokens, prompt_tokens)
            self.completion_tokens = total(self.completion_tokens, completion_tokens)
            self.usd = min(MAX_USD, self.usd + usd)


class Job(RunRequest, frozen=True, kw_only=True):
    """The request of a run, with a method to report its costs."""

    spent: Spent = msgspec.field(default_factory=Spent)
    """Sum of the reported costs, without the usage of an `Answer`."""

    @classmethod
    def of(cls, request: RunRequest, **changes: Any) -> Self:
        """Return the job of a request with some fields changed, and with no costs."""
        facts = msgspec.structs.asdict(request)
        facts.pop("spent", None)
        return cls(**{**facts, **changes})

    def report(
        self, *, tokens: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0, cost_usd: float = 0.0
    ) -> None:
        """Add costs of the run; may be called from any thread and several times.

        Args:
            tokens: Sum of all tokens, if prompt and completion are not known separately. Tokens beyond the other two
                counts are added to the completion.
            prompt_tokens: Tokens of prompts.
            completion_tokens: Tokens of completions.
            cost_usd: US dollars.

        Raises:
            BudgetExceeded: The run has used more than the task's `token_budget`; the costs are added nevertheless.
            AgentFailed: An argument is negative or not a number.

        Example:
            >>> def answer(job: Job) -> str:
            ...     reply = model(job.description)
            ...     job.report(prompt_tokens=reply.usage.prompt_tokens, completion_tokens=reply.usage.completion_tokens)
            ...     return reply.text
        """
        prompt, completion = split_tokens(tokens, prompt_tokens, completion_tokens)
        self.spent.add(prompt, completion, dollars("cost_usd", cost_usd))
        delegated_tokens = 0
        run_context = current_run()
        if run_context is not None:
            run_context.report_tokens(self.spent.tokens)
            delegated_tokens = run_context.delegated_tokens
        check_budget(self, self.spent.tokens + delegated_tokens)


@dataclass(frozen=True)
class Answer:
    """An answer with its costs, returned by a function.

    Args:
        content: Text, or a value that JSON can represent.
        usage: An object or a mapping with `prompt_tokens` and `completion_tokens`, `input_tokens` and
            `output_tokens`, or `total_tokens`. The tokens are added to those of `job.report`.
        cost_usd: US dollars, added to those of `job.report`.

    Raises:
        AgentFailed: A count is negative or not a number.

    Example:
        >>> Answer("42", usage={"prompt_tokens": 10, "completion_tokens": 2}, cost_usd=0.0001)
    """

    content: Any
    usage: Any = None
    cost_usd: float = 0.0

    def __post_init__(self) -> None:
        self.token_usage()

    def token_usage(self) -> TokenUsage:
        """Return tokens and dollars as the usage of a Done."""
        prompt, completion = split_tokens(
            _count(self.usage, "total_tokens"),
            _count(self.usage, "prompt_tokens", "input_tokens"),
            _count(self.usage, "completion_tokens", "output_tokens"),
        )
        return TokenUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=total(prompt, completion),
            estimated_cost=dollars("cost_usd", self.cost_usd),
        )


def check_budget(job: RunRequest, tokens: int, *, spent: Done | None = None) -> None:
    """Check that a run has not used more tokens than the task allows.

    Args:
        tokens: Tokens that the run has used.
        spent: The answer and its costs, for the error.

    Raises:
        BudgetExceeded: The run has used more than the task's `token_budget`.
    """
    if job.token_budget is not None and tokens > job.token_budget:
        message = f"the task's {job.token_budget} tokens are spent: {tokens} were used"
        raise BudgetExceeded(message, task_id=job.task_id, spent=spent)


def split_tokens(tokens: Any, prompt_tokens: Any, completion_tokens: Any) -> tuple[int, int]:
    """Return prompt and completion tokens; tokens beyond their sum are added to the completion.

    Raises:
        AgentFailed: A count is negative or not a whole number.
    """
    prompt, completion = whole("prompt_tokens", prompt_tokens), whole("completion_tokens", completion_tokens)
    return prompt, max(completion, whole("tokens", tokens) - prompt)


def whole(name: str, value: Any) -> int:
    """Return a number of tokens; None counts as 0.

    Raises:
        AgentFailed: The value is negative or not a whole number.
    """
    try:
        count = 0 if value is None else operator.index(value)
    except TypeError:
        count = -1
    if not 0 <= count <= MAX_INT:
        raise AgentFailed(f"{name} must be a whole number of tokens, 0 or more{_not_a(value)}")
    return count


def dollars(name: str, value: Any) -> float:
    """Return an amount of dollars, at most 1e9; None counts as 0.

    Raises:
        AgentFailed: The value is negative or not a number.
    """
    try:
        amount = 0.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        amount = math.nan
    if isinstance(value, str | bytes) or not amount >= 0:
        raise AgentFailed(f"{name} must be a number of US dollars, 0 or more{_not_a(value)}")
    return min(amount, MAX_USD)


def _not_a(value: Any) -> str:
    return "" if isinstance(value, int | float) else f", not a {type(value).__name__}"


def _count(usage: Any, *names: str) -> Any:
    """Return the first of these fields that `usage` has and that is not empty, or 0."""
    values = (usage.get(name) if isinstance(usage, Mapping) else getattr(usage, name, None) for name in names)
    return next((value for value in values if value), 0)
