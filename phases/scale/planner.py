"""The sources of a plan: the ad itself, or a model, which gets one chance to correct a bad plan."""

from loom.bus.logs.logger import get_logger
from loom.phases.shared.llm_call import LLMAnswer, call_llm
from loom.phases.shared.scale_rule import PLAN_KEY
from loom.schemas.base import MAX_CONTEXT_BYTES, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import InvalidPlan, LoomError
from loom.schemas.llm import AssistantMessage, CompletionParams, LLMProvider, Message, SystemMessage, UserMessage
from loom.schemas.plan import PLAN_SCHEMA, Subtask, parse_plan
from loom.schemas.task import TaskAd

log = get_logger()

PLAN_WITHIN_S = 60.0
"""Limit, in seconds, of a model's planning."""
PLAN_TOKENS = 2048

PROMPT = """\
Split the user's task into at most {most} subtasks that different specialists can do on their own, in parallel where \
possible.
Answer with JSON only: {{"subtasks": [{{"id", "description", "domain", "dependencies", "estimated_complexity"}}]}}.
A subtask gets the outputs of those whose ids are in its dependencies, and nothing else: its description must contain \
everything else. estimated_complexity is a number from 0 (trivial) to 1 (very hard). A task that gains nothing from \
splitting is one subtask."""


def plan_from_ad(ad: TaskAd, config: ClusterConfig) -> tuple[Subtask, ...] | None:
    """Return the plan that the ad contains; None without one.

    Raises:
        InvalidPlan: The plan breaks a rule.
    """
    plan = ad.context.get(PLAN_KEY)
    if plan is None or isinstance(plan, bool):
        return None
    return check_plan_size(parse_plan(plan if isinstance(plan, str) else encode(plan).decode()), config)


def check_plan_size(plan: tuple[Subtask, ...], config: ClusterConfig) -> tuple[Subtask, ...]:
    """Return the plan if it keeps the limits of size.

    Raises:
        InvalidPlan: The plan is too large, or not encodable.
    """
    if len(plan) > config.max_subtasks:
        raise InvalidPlan(f"the plan has {len(plan)} subtasks, at most {config.max_subtasks}", field="subtasks")
    try:
        size = len(encode(plan))
    except UnicodeEncodeError:
        raise InvalidPlan("the plan holds text that is not Unicode", field="subtasks") from None
    if size > MAX_CONTEXT_BYTES:  # the limit of a client's plan: the plan must fit into a message with its parent
        raise InvalidPlan(f"the plan is {size} bytes of JSON, at most {MAX_CONTEXT_BYTES}", field="subtasks")
    return plan


async def plan_from_model(
    llm: LLMProvider, ad: TaskAd, config: ClusterConfig, within_s: float, budget: int | None = None
) -> LLMAnswer[tuple[Subtask, ...]]:
    """Ask a model for a plan; an unusable plan is returned to the model once, with the reason.

    Args:
        within_s: Seconds for everything.
        budget: Tokens that planning may use; None: no limit.
    """
    params = CompletionParams(
        messages=(SystemMessage(PROMPT.format(most=config.max_subtasks)), UserMessage(ad.description)),
        temperature=0.3,
        max_tokens=PLAN_TOKENS,
        json_schema=PLAN_SCHEMA,
    )

    def read(answer: str) -> tuple[Subtask, ...]:
        return check_plan_size(parse_plan(answer), config)

    return await call_llm(
        llm, params, read, within_s=min(within_s, PLAN_WITHIN_S), budget=budget, repair=_repair_messages
    )


def _repair_messages(answer: str, error: LoomError) -> tuple[Message, ...]:
    log.info("plan_returned_to_model", reason=error.message)
    why = f"This plan cannot be used: {error.message}. Answer with the corrected JSON only."
    return AssistantMessage(answer[:MAX_CONTEXT_BYTES]), UserMessage(why)
