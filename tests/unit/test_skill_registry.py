import pytest

from loom.compat.skill_registry import SkillNodeRegistry
from loom.types import Skill, SkillTrigger


def keyword(name: str, *words: str, priority: float = 0.5, match_all: bool = False) -> Skill:
    return Skill(name=name, priority=priority, trigger=SkillTrigger(keywords=list(words), match_all=match_all))


def match(text: str, *skills: Skill) -> str | None:
    registry = SkillNodeRegistry()
    registry.register_all(skills)
    found = registry.find_match(text)
    return found.name if found else None


def test_skills_are_found_by_name_in_any_case() -> None:
    registry = SkillNodeRegistry()
    registry.register(Skill(name="SQL-Expert", description="writes queries", instructions="use CTEs"))

    found = registry.get("sql-expert")

    assert found is not None
    assert (found.name, found.instructions) == ("SQL-Expert", "use CTEs")
    assert registry.get("other") is None
    assert registry.describe_all() == "SQL-Expert: writes queries"


def test_a_later_skill_of_the_same_name_replaces_the_earlier() -> None:
    registry = SkillNodeRegistry()
    registry.register(Skill(name="a", description="old"))
    registry.mark_loaded("a")
    registry.register_all([Skill(name="A", description="new"), Skill(name="b")])

    assert registry.size == 2
    assert registry.get("a") == Skill(name="A", description="new")
    assert not registry.is_loaded("a")


def test_a_skill_is_loaded_once_marked() -> None:
    registry = SkillNodeRegistry()
    registry.register(Skill(name="a"))
    assert not registry.is_loaded("a")

    registry.mark_loaded("A")

    assert registry.is_loaded("a")
    with pytest.raises(KeyError):
        registry.mark_loaded("b")


def test_the_best_match_wins_not_the_first() -> None:
    weak = keyword("weak", "sort", "merge", "heap", priority=0.9)
    strong = keyword("strong", "sort", "list", priority=0.9)

    assert match("sort this list", weak, strong) == "strong"
    assert match("sort this list", strong, weak) == "strong"


def test_priority_weighs_and_ties_go_to_the_earlier() -> None:
    assert match("sort", keyword("low", "sort", priority=0.4), keyword("high", "sort", priority=0.8)) == "high"
    assert match("sort", keyword("one", "sort"), keyword("two", "sort")) == "one"


def test_a_match_below_the_minimum_is_none() -> None:
    assert match("sort", keyword("a", "sort", "list", priority=0.5)) is None
    assert match("sort", keyword("a", "sort", "list", priority=0.6)) == "a"
    assert match("sort") is None
    assert match("sort", Skill(name="no trigger", priority=1)) is None


def test_match_all_requires_every_keyword() -> None:
    both = keyword("a", "sort", "list", priority=1, match_all=True)

    assert match("sort", both) is None
    assert match("list to sort", both) == "a"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("SQL", "write some sql"),
        ("sql", "WRITE SOME SQL"),
        ("排序", "请实现排序算法"),
        ("sql", "写ＳＱＬ查询"),
        ("straße", "STRASSE"),
    ],
)
def test_keywords_match_in_any_case_and_script(word: str, text: str) -> None:
    assert match(text, keyword("a", word)) == "a"


def test_patterns_match_anywhere_in_any_case() -> None:
    csv = Skill(name="csv", trigger=SkillTrigger(type="pattern", pattern=r"\w+\.csv\b"))

    assert match("summarise SALES.CSV please", csv) == "csv"
    assert match("分析 销售.csv", csv) == "csv"
    assert match("summarise sales", csv) is None


@pytest.mark.parametrize("kind", ["semantic", "custom"])
def test_an_evaluators_answer_counts_from_the_threshold_on(kind: str) -> None:
    def skill(answer: float) -> Skill:
        trigger = SkillTrigger(type=kind, evaluator=lambda _text: answer)  # type: ignore[arg-type]  # one of the kinds
        return Skill(name="a", trigger=trigger)

    assert match("x", skill(0.69)) is None
    assert match("x", skill(0.7)) == "a"
    assert match("x", skill(True)) == "a"


def test_a_manual_skill_is_never_chosen_by_its_trigger() -> None:
    manual = keyword("a", "sort", priority=1)
    manual.activation_level = "manual"

    assert match("sort", manual) is None
