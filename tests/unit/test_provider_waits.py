import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.agents.llm.openai.waits import retry_after_s, wait_s


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"llm_provider-retry-after": "40"}, 40.0),
        ({"llm_provider-retry-after": "40", "retry-after": "7"}, 7.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 02:00:07 GMT", "date": "Thu, 01 Jan 1970 02:00:00 GMT"}, 7.0),
    ],
)
def test_the_retry_after_of_a_server_is_parsed(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, now=60.0) == expected


@given(st.text())
def test_no_retry_after_header_does_harm(text: str) -> None:
    wait = retry_after_s({"retry-after": text}, now=60.0)

    assert wait is None or 0 <= wait < float("inf")


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({"retry-after": "1m30s"}, None, 90),
        ({}, {"error": {"message": "Please try again in 1m2.5s."}}, 62.5),
        ({}, "Rate limited. Please retry after 20 seconds.", 20),
        ({}, {"detail": "Try again in 5 minutes"}, 300),
        ({}, {"error": {"message": "try again in 120ms"}}, 0.12),
        ({}, {"error": {"details": [{"retryDelay": "34s"}], "message": "retry in 34.07s"}}, 34),
        ({}, {"error": {"metadata": {"headers": {"X-RateLimit-Reset": "1060000"}}}}, 1_060_000),
        ({}, {"error": {"metadata": {"headers": {"X-RateLimit-Reset": "2000000060000"}}}}, 60),
        ({"x-ratelimit-reset": "2000000060"}, {}, 60),
        ({"x-ratelimit-reset-requests": "20s", "x-ratelimit-reset-tokens": "6m0s"}, {}, 360),
        (
            {
                "x-ratelimit-reset-requests": "20s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "12000",
            },
            {},
            20,
        ),
        ({}, {"error": {"message": "You wait in vain"}}, None),
        ({}, {"error": {"retry_after": True}}, None),
        ({"x-ratelimit-reset-requests": "soon"}, None, None),
    ],
)
def test_a_wait_is_found_in_headers_and_bodies(headers: dict[str, str], body: object, expected: float | None) -> None:
    assert wait_s(headers, body, now=2_000_000_000) == expected
