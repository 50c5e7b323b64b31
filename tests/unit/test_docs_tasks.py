"""docs/tasks.md names every field and code there is."""

import re
from pathlib import Path

from loom.schemas.errors import BY_CODE
from loom.schemas.task import TaskAd, TaskResult

TEXT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[str]:
    section = TEXT.split(f"## {heading}")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


def test_every_field_of_an_ad_is_described() -> None:
    assert rows("What you send") == list(TaskAd.__struct_fields__)


def test_every_field_of_a_result_is_described() -> None:
    assert rows("What you get") == list(TaskResult.__struct_fields__)


def test_every_code_is_described() -> None:
    assert rows("Error codes") == list(BY_CODE)
