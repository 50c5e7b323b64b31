import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.agents.llm.waits import retry_after_s


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 02:00:07 GMT", "date": "Thu, 01 Jan 1970 02:00:00 GMT"}, 7.0),
    ],
)
def test_the_wait_a_server_asks_for_is_understood(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, now=60.0) == expected


@given(st.text())
def test_no_retry_after_header_does_harm(text: str) -> None:
    wait = retry_after_s({"retry-after": text}, now=60.0)

    assert wait is None or 0 <= wait < float("inf")
