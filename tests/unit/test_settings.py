"""Settings from the environment, and their table in docs/settings.md.

Run as a script, this file writes the table.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from loom.runner.settings import NAME_PATTERN, InvalidSetting, Settings, from_environment, misspelt
from loom.schemas.base import MAX_SECONDS
from loom.schemas.config import ClusterConfig
from loom.schemas.identity import RESERVED, Identity

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
BEGIN, END = "<!-- table: written by tests/unit/test_settings.py -->\n", "<!-- end of table -->\n"


def test_an_empty_environment_gives_the_defaults() -> None:
    assert from_environment({}) == Settings()


def test_variables_are_parsed_as_their_types() -> None:
    settings = from_environment(
        {
            "NATS_URL": "nats://one,nats://two",
            "LOOM_NAMESPACE": "team-a",
            "LOOM_LOG_LEVEL": "debug",
            "LOOM_SYNC_INTERVAL": "500ms",
            "LOOM_MAX_ATTEMPTS": "5",
            "LOOM_EXPLORATION": "0",
            "LOOM_IDLE_TIMEOUT_S": "1.5",
            "LOOM_JUDGE_WEIGHTS": "person=5, linter=0.5,rules=0",
        }
    )

    assert settings.nats_url == "nats://one,nats://two"
    assert settings.loom_namespace == "team-a"
    assert settings.loom_log_level == "debug"
    assert settings.loom_sync_interval == "500ms"
    assert settings.cluster == ClusterConfig(
        max_attempts=5,
        exploration=0.0,
        idle_timeout_s=1.5,
        judge_weights={"person": 5.0, "linter": 0.5, "rules": 0.0},
    )


def test_an_empty_variable_is_as_good_as_none_and_strangers_are_ignored() -> None:
    assert (
        from_environment({"LOOM_MAX_DEPTH": "", "NATS_URL": "", "LOOM_PORT": "tcp://x", "CLUSTER": "y"}) == Settings()
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LOOM_NAMESPACE", "Loom.A"),
        ("LOOM_LOG_LEVEL", "loud"),
        ("LOOM_SYNC_INTERVAL", "now and then"),
        ("LOOM_SYNC_INTERVAL", "0s"),
        ("LOOM_SYNC_INTERVAL", "10"),
        ("LOOM_MAX_DEPTH", "two"),
        ("LOOM_MAX_DEPTH", "17"),
        ("LOOM_MITOSIS_THRESHOLD", "1.1"),
        ("LOOM_IDLE_TIMEOUT_S", "nan"),
        ("LOOM_IDLE_TIMEOUT_S", "inf"),
        ("LOOM_JUDGE_WEIGHTS", "person"),
        ("LOOM_JUDGE_WEIGHTS", "person=3,"),
        ("LOOM_JUDGE_WEIGHTS", "=3"),
        ("LOOM_JUDGE_WEIGHTS", "person=3=4"),
        ("LOOM_JUDGE_WEIGHTS", "person=3,person=4"),
        ("LOOM_JUDGE_WEIGHTS", "person=much"),
        ("LOOM_JUDGE_WEIGHTS", "person=-1"),
        ("LOOM_JUDGE_WEIGHTS", "person=nan"),
        ("LOOM_JUDGE_WEIGHTS", "person=inf"),
        ("LOOM_JUDGE_WEIGHTS", "a person=1"),
        ("LOOM_JUDGE_WEIGHTS", '{"person": 3}'),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        from_environment({variable: value, "LOOM_MAX_ATTEMPTS": "5"})

    assert caught.value.field == variable
    assert re.match(rf"{variable}: must be ", caught.value.message)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("LOOM_MAX_ATTEMPTS", "two", "must be a whole number"),
        ("LOOM_MAX_ATTEMPTS", "0", "must be a whole number of at least 1"),
        ("LOOM_MAX_ATTEMPTS", "101", "must be a whole number of at most 100"),
        ("LOOM_EXPLORATION", "much", "must be a number"),
        ("LOOM_JUDGE_SHARE", "1.5", "must be a number of at most 1"),
        (
            "LOOM_NAMESPACE",
            "Loom.A",
            "must be 1 to 32 small letters, digits, - or _, and begin with a letter or a digit",
        ),
        ("LOOM_LOG_LEVEL", "loud", "must be debug, info, warning or error"),
        ("LOOM_EVENT_LOOP", "trio", "must be auto, uvloop or asyncio"),
        ("LOOM_SYNC_INTERVAL", "soon", "must be always, or a time such as 500ms, 10s, 2m or 1h"),
        ("LOOM_JUDGE_WEIGHTS", "person", "must be name=weight, or several with commas between; each weight a number"),
    ],
)
def test_a_refusal_is_a_sentence_that_a_person_can_follow(variable: str, value: str, words: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        from_environment({variable: value})

    assert caught.value.message.startswith(f"{variable}: {words}")
    assert not any(sign in caught.value.message for sign in "`^$\\")


@pytest.mark.parametrize("variable", ["LOOM_SUBMITTER", "LOOM_OWNER", "LOOM_SOURCE"])
@pytest.mark.parametrize("value", [*sorted(RESERVED), "two words", "a.b", "*", "x" * 65, "ann\n"])
def test_a_name_that_is_reserved_or_not_a_token_is_refused_in_one_sentence(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        from_environment({variable: value})

    assert caught.value.field == variable
    assert caught.value.message == (
        f"{variable}: must be 1 to 64 letters, digits, - or _, and not one of the reserved names "
        "adapt, eval, evaluate, execute, import, judge, match, rules, scale, sense"
    )


@pytest.mark.parametrize("value", ["ann", "TEAM_A", "senses", "my-judge", "x" * 64, "0"])
def test_a_name_that_only_resembles_a_reserved_one_is_accepted(value: str) -> None:
    named = from_environment({"LOOM_SUBMITTER": value, "LOOM_OWNER": value, "LOOM_SOURCE": value}).identity

    assert named == Identity(submitter=value, owner=value, source=value)


def test_without_names_a_process_is_that_of_a_single_user() -> None:
    assert from_environment({}).identity == Identity(submitter="public", owner="local", source="person")


@pytest.mark.parametrize("level", ["INFO", "Info", " info "])
def test_the_case_of_a_level_does_not_matter(level: str) -> None:
    settings = from_environment({"LOOM_LOG_LEVEL": level, "LOOM_EVENT_LOOP": "AsyncIO"})

    assert (settings.loom_log_level, settings.loom_event_loop) == ("info", "asyncio")


@pytest.mark.parametrize(
    ("variable", "known"),
    [
        ("LOOM_LOGLEVEL", "LOOM_LOG_LEVEL"),
        ("LOOM_LOG_LEVLE", "LOOM_LOG_LEVEL"),
        ("LOOM_MAX_ATTEMPT", "LOOM_MAX_ATTEMPTS"),
        ("LOOM_NAME_SPACE", "LOOM_NAMESPACE"),
        ("loom_namespace", "LOOM_NAMESPACE"),
        ("LOOM_NATS_URL", "NATS_URL"),
        ("LOOM_REPLICA", "LOOM_REPLICAS"),
    ],
)
def test_a_misspelt_variable_is_noticed_with_the_nearest_known_name(variable: str, known: str) -> None:
    assert misspelt({variable: "x", "PATH": "y"}) == {variable: known}


def test_known_variables_and_those_a_container_platform_sets_are_not_misspelt() -> None:
    known = [f"LOOM_{field.name.upper()}" for field in msgspec.structs.fields(ClusterConfig)]
    known += [field.name.upper() for field in msgspec.structs.fields(Settings)]
    platform = ["LOOM_PORT", "LOOM_SERVICE_HOST", "LOOM_SERVICE_PORT", "LOOM_PORT_4222_TCP", "LOOM_PORT_4222_TCP_ADDR"]

    assert misspelt(dict.fromkeys([*known, *platform, "NATS_URI", "HOME"], "x")) == {}


def test_the_page_of_settings_holds_the_table_as_the_code_has_it() -> None:
    """After a change of settings: `python tests/unit/test_settings.py`."""
    assert table() in PAGE.read_text(encoding="utf-8")


# -- the table


def table() -> str:
    rows = [
        *rows_of(Settings, ""),
        *rows_of(ClusterConfig, "LOOM_"),
    ]
    head = ["| Variable | Default | Values | Meaning |", "|---|---|---|---|"]
    return BEGIN + "\n".join(head + rows) + "\n" + END


def rows_of(shape: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    docs = field_docs(shape)
    for field in msgspec.structs.fields(shape):
        if field.name == "cluster":
            continue
        default = "none" if field.default in {"", msgspec.NODEFAULT} else f"`{field.default}`"
        doc = docs.get(field.name, "").removeprefix(f"{field.name.upper()}. ").replace("`", "")
        yield f"| `{prefix}{field.name.upper()}` | {default} | {values(field.type)} | {doc} |"


def values(hint: object) -> str:
    """Return the allowed values of a variable, from the field's type."""
    return values_of(msgspec.inspect.type_info(hint))


def values_of(kind: msgspec.inspect.Type) -> str:
    if isinstance(kind, msgspec.inspect.StrType):
        if kind.pattern == NAME_PATTERN:
            return "`[A-Za-z0-9_-]{1,64}`, none of " + ", ".join(sorted(RESERVED))
        pattern = (kind.pattern or "").removeprefix("^").removesuffix(r"\Z")
        return f"`{pattern}`".replace("|", r"\|") if pattern else "text"
    if isinstance(kind, msgspec.inspect.DictType):
        return f"`name=value,name=value`; each a {values_of(kind.value_type)}"
    assert isinstance(kind, (msgspec.inspect.IntType, msgspec.inspect.FloatType))
    noun = "whole number" if isinstance(kind, msgspec.inspect.IntType) else "number"
    upper = "" if kind.le is None or kind.le >= MAX_SECONDS else f" to {kind.le:g}"  # what no setting comes near
    return f"{noun}, {kind.ge:g}{upper}" if upper else f"{noun}, at least {kind.ge:g}"


def field_docs(shape: type) -> dict[str, str]:
    """field -> the text directly under it in the source."""
    (cls,) = ast.parse(inspect.getsource(shape)).body
    assert isinstance(cls, ast.ClassDef)
    docs = {}
    for field, below in zip(cls.body, cls.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + table() + rest.split(END)[1], encoding="utf-8")
