"""The choice of a skill for a task, as in loom-agent 0.6: by triggers, by a model, or by words."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.loop_ownership import running_loop
from loom.compat.skill_registry import SkillNodeRegistry, best_by_words
from loom.schemas.auction import SpawnRequest
from loom.schemas.llm import CompletionParams, LLMProvider, SystemMessage, UserMessage
from loom.skills import Skill

PROMPT = """\
Choose the skill that the user's task calls for. Answer with JSON only: {{"skill": "NAME"}}, where NAME is one of the \
names below, or "none" where no skill fits.

{skills}"""
NONE = "none"
WITHIN_S = 10.0
MAX_ANSWERS = 256
"""Most choices in the cache: the newest."""
MAX_QUESTIONS = 4
"""Most concurrent questions to the model; beyond it, words decide."""

log = get_logger()


class SkillChooser:
    """Chooses a skill by triggers, otherwise by the model, otherwise by the words of names and descriptions.

    `choose` returns at once; while the model is asked it returns None. The request for a node of a task without bids
    is repeated for some seconds, so a later one finds the answer.
    """

    def __init__(self, registry: SkillNodeRegistry, provider: LLMProvider) -> None:
        self._registry = registry
        self._provider = provider
        self._answers: OrderedDict[tuple[str, tuple[str, ...]], Skill | None] = OrderedDict()
        self._questions: dict[tuple[str, tuple[str, ...]], asyncio.Task[None]] = {}

    def choose(self, wanted: SpawnRequest) -> Skill | None:
        """Return the skill for the task; None without one, or while the model is deciding.

        Exceptions of a trigger's evaluator are raised.
        """
        skill = self._registry.find_triggered(wanted.description, required_tools=wanted.required_tools)
        if skill is not None:
            return skill
        skills = self._registry.described(required_tools=wanted.required_tools)
        key = (wanted.description, tuple(skill.name for skill in skills))
        if not skills or key in self._questions:
            return None
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key]
        if running_loop() is None or len(self._questions) >= MAX_QUESTIONS:
            return best_by_words(wanted.description, skills)
        question = asyncio.create_task(self._ask(key, skills), name="skill choice")
        self._questions[key] = question
        question.add_done_callback(lambda _: self._questions.pop(key, None))
        return None

    async def _ask(self, key: tuple[str, tuple[str, ...]], skills: Sequence[Skill]) -> None:
        text, names = key
        params = CompletionParams(
            messages=(SystemMessage(PROMPT.format(skills=_described(skills))), UserMessage(text)),
            temperature=0.0,
            max_tokens=1024,
            json_schema={
                "type": "object",
                "properties": {"skill": {"enum": [*names, NONE]}},
                "required": ["skill"],
                "additionalProperties": False,
            },
            timeout_s=WITHIN_S,
        )
        try:
            async with asyncio.timeout(WITHIN_S):
                answer = (await self._provider.complete(params)).content
        except Exception as error:  # noqa: BLE001 - a user's provider may raise anything; then words decide
            log.warning("skill_choice_failed", **error_fields(error))
            chosen = best_by_words(text, skills)
        else:
            chosen = named_in(answer, skills)
            log.info("skill_chosen", skill=chosen.name if chosen else None)
        self._answers[key] = chosen
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)


def named_in(answer: str, skills: Sequence[Skill]) -> Skill | None:
    """Return the skill that a model's answer names; None if it names none or several."""
    quoted = [skill for skill in skills if f'"{skill.name.casefold()}"' in answer.casefold()]
    named = quoted or [skill for skill in skills if skill.name.casefold() == answer.strip(" .'\n`").casefold()]
    return named[0] if len(named) == 1 else None


def _described(skills: Sequence[Skill]) -> str:
    return "\n".join(f"{skill.name}: {skill.description}" for skill in skills)
