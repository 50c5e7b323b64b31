"""The choice of a skill for a task, for skills without a trigger."""

import asyncio
import json

import pytest

from loom.compat.skill_choice import SkillChooser, named_in
from loom.compat.skill_registry import SkillNodeRegistry, best_by_words
from loom.schemas.auction import SpawnRequest
from loom.schemas.llm import CompletionParams, CompletionResult
from loom.types import Skill, SkillTrigger

CODER = Skill(name="coder", description="Writes Python programs.")
ANALYST = Skill(name="data analyst", description="Reads tables and finds trends in sales figures.")
SKILLS = [CODER, ANALYST]


class Choosing:
    """A model that answers with one skill."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.asked: list[CompletionParams] = []

    async def complete(self, params: CompletionParams) -> CompletionResult:
        self.asked.append(params)
        if isinstance(self.answer, Exception):
            raise self.answer
        return CompletionResult(content=self.answer)


def wanted(text: str) -> SpawnRequest:
    return SpawnRequest(domain_token="general", description=text)


def registry(*skills: Skill) -> SkillNodeRegistry:
    made = SkillNodeRegistry()
    made.register_all(skills)
    return made


async def chosen(model: Choosing, text: str, *skills: Skill) -> list[Skill | None]:
    """The choice before the model has answered, and after."""
    chooser = SkillChooser(registry(*skills), model)  # type: ignore[arg-type]  # it does not stream
    first = chooser.choose(wanted(text))
    for question in list(chooser._questions.values()):
        await question
    return [first, chooser.choose(wanted(text))]


async def test_the_choice_of_the_model_is_cached_for_the_next_request() -> None:
    model = Choosing('{"skill": "data analyst"}')

    assert await chosen(model, "anything", *SKILLS) == [None, ANALYST]
    [asked] = model.asked
    assert "coder: Writes Python programs." in asked.messages[0].content
    assert asked.messages[1].content == "anything"
    assert asked.json_schema is not None
    assert asked.json_schema["properties"]["skill"]["enum"] == ["coder", "data analyst", "none"]


async def test_a_trigger_that_matches_goes_before_the_model() -> None:
    model = Choosing('{"skill": "coder"}')
    poet = Skill(name="poet", priority=1, trigger=SkillTrigger(keywords=["poem"]))

    assert await chosen(model, "a poem", CODER, poet) == [poet, poet]
    assert not model.asked


@pytest.mark.parametrize("answer", ['{"skill": "none"}', "I would take both.", ""])
async def test_a_model_that_names_no_skill_chooses_none(answer: str) -> None:
    assert await chosen(Choosing(answer), "programs in Python", *SKILLS) == [None, None]


async def test_words_decide_where_the_model_cannot_answer() -> None:
    assert await chosen(Choosing(RuntimeError("down")), "find trends in these sales", *SKILLS) == [None, ANALYST]


async def test_one_task_causes_one_request_while_the_model_works() -> None:
    model = Choosing('{"skill": "coder"}')
    chooser = SkillChooser(registry(*SKILLS), model)  # type: ignore[arg-type]  # it does not stream
    choices = [chooser.choose(wanted("sort")) for _ in range(3)]
    await asyncio.gather(*chooser._questions.values())

    assert (choices, len(model.asked)) == ([None, None, None], 1)


async def test_a_skill_to_be_used_by_hand_is_not_chosen() -> None:
    model = Choosing('{"skill": "coder"}')
    by_hand = Skill(name="coder", activation_level="manual")

    assert await chosen(model, "coder", by_hand) == [None, None]
    assert not model.asked


def test_an_answer_names_a_skill_as_json_or_alone() -> None:
    for answer in ('{"skill": "Coder"}', '```json\n{"skill": "coder"}\n```', "coder.", " Coder\n"):
        assert named_in(answer, SKILLS) is CODER
    for answer in (json.dumps([skill.name for skill in SKILLS]), "decoder", "none"):
        assert named_in(answer, SKILLS) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("write a Python program", "coder"),
        ("the coder should do this", "coder"),
        ("what are the trends in these tables?", "data analyst"),
        ("write me a poem", None),
        ("find it", None),
    ],
)
def test_words_of_the_name_and_the_description_choose(text: str, name: str | None) -> None:
    found = best_by_words(text, SKILLS)

    assert (found.name if found else None) == name


def test_words_of_chinese_are_pairs_of_characters() -> None:
    skills = [Skill(name="编程", description="编写程序和算法"), Skill(name="数据", description="分析表格")]

    assert best_by_words("实现一个排序算法程序", skills) is skills[0]
    assert best_by_words("分析这个表格", skills) is skills[1]
    assert best_by_words("写一首诗", skills) is None


def test_a_registry_without_a_model_matches_words() -> None:
    assert registry(*SKILLS).find_match("programs in Python") is CODER


def test_a_trigger_may_be_a_dict_of_its_fields() -> None:
    skill = Skill(name="a", priority=1, trigger={"type": "keyword", "keywords": ["sql"]})  # type: ignore[arg-type]

    assert skill.trigger == SkillTrigger(keywords=["sql"])
    assert registry(skill).find_match("some sql") is skill
    with pytest.raises(ValueError, match="not a SkillTrigger"):
        Skill(name="a", trigger={"keyword": "sql"})  # type: ignore[arg-type]
