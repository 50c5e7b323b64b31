"""Where a plan comes from: the ad itself, or a model, asked a second time with its mistakes."""

from loom.bus.logs.logger import get_logger
from loom.phases.shared.division import PLAN
from loom.phases.shared.llm_call import Answer, ask
from loom.schemas.base import MAX_CONTEXT_BYTES, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import InvalidPlan, LoomError
from loom.schemas.llm import AssistantMessage, CompletionParams, LLMProvider, Message, SystemMessage, UserMessage
from loom.schemas.plan import PLAN_SCHEMA, Subtask, parse_plan
from loom.schemas.task import TaskAd

log = get_logger()

PLAN_WITHIN_S = 60.0
"""A plan that takes a model longer is not worth waiting for."""
PLAN_TOKENS = 2048

PROMPT = """\
Split the user's task into at most {most} subtasks that different specialists can do on their own, in parallel where \
possible.
Answer with JSON only: {{"subtasks": [{{"id", "description", "domain", "dependencies", "estimated_complexity"}}]}}.
A subtask gets the outputs of those whose ids are in its dependencies, and nothing else: its description must say all \
the rest. estimated_complexity is a number from 0 (trivial) to 1 (very hard). A task that gains nothing from \
splitting is one subtask."""


def plan_from_ad(ad: TaskAd, config: ClusterConfig) -> tuple[Subtask, ...] | None:
    """Return the plan the ad itself gives; None when it gives none.

    Raises:
        InvalidPlan: It breaks a rule.
    """
    plan = ad.context.get(PLAN)
    if plan is None or isinstance(plan, bool):
        return None
    return bounded(parse_plan(plan if isinstance(plan, str) else encode(plan).decode()), config)


def bounded(plan: tuple[Subtask, ...], config: ClusterConfig) -> tuple[Subtask, ...]:
    """Return the plan, if it is not too large.

    Raises:
        InvalidPlan: It is.
    """
    if len(plan) > config.max_subtasks:
        raise InvalidPlan(f"the plan has {len(plan)} subtasks, at most {config.max_subtasks}", field="subtasks")
    try:
        size = len(encode(plan))
    except UnicodeEncodeError:
        raise InvalidPlan("the plan holds text that is not Unicode", field="subtasks") from None
    if size > MAX_CONTEXT_BYTES:  # as much as a client may give: it must fit, with its parent, wherever it is kept
        raise InvalidPlan(f"the plan is {size} bytes of JSON, at most {MAX_CONTEXT_BYTES}", field="subtasks")
    return plan


async def plan_from_model(
    llm: LLMProvider, ad: TaskAd, config: ClusterConfig, within_s: float, budget: int | None = None
) -> Answer[tuple[Subtask, ...]]:
    """Ask a model for a plan; a bad one is sent back once, with what is wrong with it.

    Args:
        budget: Tokens the plan may take; None: no limit.
    """
    params = CompletionParams(
        messages=(SystemMessage(PROMPT.format(most=config.max_subtasks)), UserMessage(ad.description)),
        temperature=0.3,
        max_tokens=PLAN_TOKENS,
        json_schema=PLAN_SCHEMA,
    )

    def read(answer: str) -> tuple[Subtask, ...]:
        return bounded(parse_plan(answer), config)

    return await ask(llm, params, read, within_s=min(within_s, PLAN_WITHIN_S), budget=budget, mend=_mended)


def _mended(answer: str, error: LoomError) -> tuple[Message, ...]:
    log.info("plan_sent_back", reason=error.message)
    why = f"This plan cannot be used: {error.message}. Answer with the corrected JSON only."
    return AssistantMessage(answer[:MAX_CONTEXT_BYTES]), UserMessage(why)
