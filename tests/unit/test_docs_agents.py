"""docs/agents.md: its tables are complete, and their values are those of the code."""

import dataclasses
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from support.pages import programs, section, table

import loom.types
from loom import AgentConfig, Job, LoomError
from loom.agents.function_agent import as_agent
from loom.agents.llm.config import OF_PROVIDERS
from loom.agents.protocol import OWN_CODES
from loom.agents.signatures import takes_text
from loom.agents.values import to_text
from loom.runner.cli.input_files import load_node_file
from loom.schemas import errors
from loom.schemas.base import decode, encode
from loom.schemas.events import AgentEvent
from loom.schemas.run import Delta, RunRequest

PAGE = "docs/agents.md"


def rows(heading: str, column: int = 0) -> list[str]:
    """The cells of a column, as code."""
    return [row[column].strip("`") for row in table(PAGE, heading)]


def test_every_field_of_a_job_is_described() -> None:
    assert rows("The job") == list(Job.__struct_fields__)


def test_every_option_is_described_with_its_default() -> None:
    described = {name: eval(default) for name, default in zip(rows("Options"), rows("Options", 1), strict=True)}

    assert list(described) == [field.name for field in dataclasses.fields(AgentConfig)]
    assert described == {name: getattr(AgentConfig(), name) for name in described}


def test_the_options_of_the_agent_are_those_that_its_provider_does_not_read() -> None:
    [sentence] = re.findall(
        r"^(`system_prompt`.*?) are the agent's", section(PAGE, "Options"), re.MULTILINE | re.DOTALL
    )

    assert set(re.findall(r"`(\w+)`", sentence)) == set(rows("Options")) - set(OF_PROVIDERS)


def test_every_event_is_shown_as_its_json() -> None:
    made = [eval(code, vars(loom.types)) for code in rows("Events")]

    assert [encode(event).decode() for event in made] == rows("Events", 1)
    assert {type(event) for event in made} == set(get_args(AgentEvent))
    [shown] = re.findall(r"```json\n(.*?)\n```", section(PAGE, "Events"))
    assert encode(decode(shown.encode(), Delta)).decode() == shown


def arguments(row: int) -> list[str]:
    return re.findall(r"`([^`]+)`", table(PAGE, "What a function gets")[row][0])


def function_of(argument: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"Job": Job, "RunRequest": RunRequest, "Annotated": Annotated, "Any": Any}
    exec(f"def function({argument}):\n    return ''", names)
    function: Callable[..., Any] = names["function"]
    return function


@pytest.mark.parametrize("argument", arguments(0))
def test_arguments_that_get_the_text(argument: str) -> None:
    assert takes_text(function_of(argument))


@pytest.mark.parametrize("argument", arguments(1))
def test_arguments_that_get_the_job(argument: str) -> None:
    assert not takes_text(function_of(argument))


@pytest.mark.parametrize("argument", arguments(2))
def test_arguments_that_are_refused(argument: str) -> None:
    with pytest.raises(LoomError, match="str for the text of the task"):
        as_agent(function_of(argument))


@dataclasses.dataclass
class Report:
    title: str
    year: int


@pytest.mark.parametrize(("value", "answer"), table(PAGE, "What a function returns"))
def test_values_and_the_answers_they_make(value: str, answer: str) -> None:
    assert to_text(eval(value.strip("`"), {"date": date, "Path": Path, "Report": Report})) == answer.strip("`")


def test_the_errors_for_agents_exist_and_may_be_published() -> None:
    named = {re.findall(r"`(\w+)", row[0])[0] for row in table(PAGE, "Errors") if row[0].startswith("`")}

    assert {getattr(errors, name).code for name in named} == OWN_CODES - {"deadline_exceeded"}


@pytest.mark.parametrize("config", [row[1] for row in table(PAGE, "Servers")])
def test_the_config_of_each_server_may_be_made(config: str) -> None:
    [code] = re.findall(r"`(AgentConfig\(.*?\))`", config)

    assert eval(code, {"AgentConfig": AgentConfig}).model


def test_the_file_of_nodes_may_be_hosted(tmp_path: Path) -> None:
    path = tmp_path / "nodes.py"
    [code] = [each.code for each in programs(PAGE) if "nodes = [" in each.code]
    path.write_text(code, encoding="utf-8")

    file = load_node_file(path)

    assert [node.id for node in file.nodes] == ["versions"]
    assert file.lifespan is not None
