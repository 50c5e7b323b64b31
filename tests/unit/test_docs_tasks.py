"""docs/tasks.md names every field and every error code."""

from support.pages import table

from loom.schemas.errors import BY_CODE
from loom.schemas.task import TaskAd, TaskResult


def names(heading: str) -> list[str]:
    return [row[0].strip("`") for row in table("docs/tasks.md", heading)]


def test_every_field_of_an_ad_is_described() -> None:
    assert names("What you send") == list(TaskAd.__struct_fields__)


def test_every_field_of_a_result_is_described() -> None:
    assert names("What you get") == list(TaskResult.__struct_fields__)


def test_every_code_is_described() -> None:
    assert names("Error codes") == list(BY_CODE)
