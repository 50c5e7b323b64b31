"""What user code gets of a run, what it reports of its costs, and the answer that carries them."""

import math
import operator
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, Self

import msgspec

from loom.schemas.base import MAX_INT, total
from loom.schemas.errors import AgentFailed, BudgetExceeded
from loom.schemas.events import TokenUsage
from loom.schemas.run import RunRequest

MAX_USD = 1e9

_lock = threading.Lock()
"""Held while costs are added: a sync agent may report from several threads."""


class RunCosts(Protocol):
    """What a run on a host has taken so far."""

    own_tokens: int
    """By the agent itself, as far as it reports them."""

    @property
    def delegated_tokens(self) -> int:
        """Tokens of what the run has delegated."""
        ...


run_costs: ContextVar[RunCosts | None] = ContextVar("run_costs", default=None)
"""The costs of the run that user code works for; None outside of a host."""


class Spent(msgspec.Struct):
    """The tokens and dollars a run has reported so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return total(self.prompt_tokens, self.completion_tokens)

    def add(self, prompt_tokens: int, completion_tokens: int, usd: float) -> None:
        """Add costs, up to the greatest numbers a message carries."""
        with _lock:
            self.prompt_tokens = total(self.prompt_tokens, prompt_tokens)
            self.completion_tokens = total(self.completion_tokens, completion_tokens)
            self.usd = min(MAX_USD, self.usd + usd)


class Job(RunRequest, frozen=True, kw_only=True):
    """A run request in the hands of user code: the task, and a way to report what the run costs."""

    spent: Spent = msgspec.field(default_factory=Spent)
    """What `report` has added up. An `Answer`'s usage is not in it."""

    @classmethod
    def of(cls, request: RunRequest) -> Self:
        """Return the job of a request; nothing is spent yet."""
        facts = msgspec.structs.asdict(request)
        facts.pop("spent", None)
        return cls(**facts)

    def report(
        self, *, tokens: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0, cost_usd: float = 0.0
    ) -> None:
        """Add to what the run has cost; from any thread, as often as there is something to report.

        Args:
            tokens: All tokens, where they are not known apart. What prompt and completion leave of them counts as
                completion tokens.
            prompt_tokens: Tokens read.
            completion_tokens: Tokens written.
            cost_usd: US dollars.

        Raises:
            BudgetExceeded: The task's `token_budget` is spent; the costs are counted all the same.
            AgentFailed: An argument is negative or not a number.

        Example:
            >>> def answer(job: Job) -> str:
            ...     reply = model(job.description)
            ...     job.report(prompt_tokens=reply.usage.prompt_tokens, completion_tokens=reply.usage.completion_tokens)
            ...     return reply.text
        """
        prompt, completion = split_tokens(tokens, prompt_tokens, completion_tokens)
        self.spent.add(prompt, completion, dollars("cost_usd", cost_usd))
        others = 0
        costs = run_costs.get()
        if costs is not None:
            costs.own_tokens = max(costs.own_tokens, self.spent.tokens)
            others = costs.delegated_tokens
        check_budget(self, self.spent.tokens + others)


@dataclass(frozen=True)
class Answer:
    """An answer together with what it has cost, for a function to return.

    Args:
        content: Text, or any value that can be sent.
        usage: Tokens: an object or a mapping with `prompt_tokens` and `completion_tokens`, `input_tokens` and
            `output_tokens`, or `total_tokens`. They add to what `job.report` has counted.
        cost_usd: US dollars, likewise.

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
        """Return tokens and dollars as an agent's last event carries them."""
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


def check_budget(job: RunRequest, tokens: int) -> None:
    """Return if a run may have taken so many tokens.

    Raises:
        BudgetExceeded: They are more than the task's `token_budget`.
    """
    if job.token_budget is not None and tokens > job.token_budget:
        message = f"the task's {job.token_budget} tokens are spent: {tokens} were used"
        raise BudgetExceeded(message, task_id=job.task_id)


def split_tokens(tokens: Any, prompt_tokens: Any, completion_tokens: Any) -> tuple[int, int]:
    """Return prompt and completion tokens; what they leave of `tokens` counts as completion.

    Raises:
        AgentFailed: A count is negative or not a whole number.
    """
    prompt, completion = whole("prompt_tokens", prompt_tokens), whole("completion_tokens", completion_tokens)
    return prompt, max(completion, whole("tokens", tokens) - prompt)


def whole(name: str, value: Any) -> int:
    """Return a count of tokens; None counts as 0.

    Raises:
        AgentFailed: It is negative or not a whole number.
    """
    try:
        count = 0 if value is None else operator.index(value)
    except TypeError:
        count = -1
    if not 0 <= count <= MAX_INT:
        raise AgentFailed(f"{name} must be a whole number of tokens, 0 or more{_not_a(value)}")
    return count


def dollars(name: str, value: Any) -> float:
    """Return a sum of dollars, at most 1e9; None counts as 0.

    Raises:
        AgentFailed: It is negative or not a number.
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
    """The first of these fields that `usage` has and that is not empty."""
    values = (usage.get(name) if isinstance(usage, Mapping) else getattr(usage, name, None) for name in names)
    return next((value for value in values if value), 0)
