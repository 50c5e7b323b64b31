import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom.agents.llm.openai.tool_calls import MAX_CALL_BYTES, MAX_CALLS, ToolCalls, plain_arguments
from loom.schemas.errors import AgentFailed, LoomError


def call(index: int | None, identity: str | None, name: str | None, arguments: Any, **more: Any) -> dict[str, Any]:
    """A fragment of a call; what is None is absent."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fragment = {"type": "function", "function": function, **more}
    return fragment | {key: value for key, value in (("index", index), ("id", identity)) if value is not None}


def streamed(*events: Any) -> list[tuple[str, str]]:
    """Name and arguments of the calls in these events; a single fragment is an event."""
    calls = ToolCalls()
    for event in events:
        calls.add_fragments(event)
    finished = calls.finished()
    assert len({each.id for each in finished}) == len(finished)
    assert all(each.id for each in finished)
    return [(each.name, each.arguments) for each in finished]


TWO = [("add", '{"a":1}'), ("add", '{"a":2}')]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([call(0, "", "add", '{"a":1}'), call(0, "", "add", '{"a":2}')], id="one index, empty ids"),
        pytest.param([call(0, None, "add", '{"a":1}'), call(0, None, "add", '{"a":2}')], id="one index, no ids"),
        pytest.param([call(0, "x", "add", '{"a":1}'), call(0, "x", "add", '{"a":2}')], id="one index, equal ids"),
        pytest.param([call(0, "x", "add", '{"a":1}'), call(0, "y", "add", '{"a":2}')], id="one index, two ids"),
        pytest.param([call(None, None, "add", '{"a":1}'), call(None, None, "add", '{"a":2}')], id="neither"),
        pytest.param([[call(0, "x", "add", '{"a":1}'), call(1, "x", "add", '{"a":2}')]], id="one event, equal ids"),
        pytest.param([[call(0, "", "add", {"a": 1}), call(0, "", "add", {"a": 2})]], id="one event, objects"),
        pytest.param(
            [
                [call(0, "x", "add", ""), call(1, "y", "add", "")],
                call(1, None, None, '{"a":2}'),
                call(0, None, None, '{"a":1}'),
            ],
            id="fragments of two indexes in turns",
        ),
        pytest.param(
            [
                call(0, None, "add", ""),
                call(0, None, None, '{"a":1}'),
                call(0, None, "add", '{"a"'),
                call(0, None, None, ":2}"),
            ],
            id="a name begins the second call",
        ),
        pytest.param(
            [call(None, "x", "add", '{"a":1}'), call(None, "y", "add", ""), call(None, "y", None, '{"a":2}')],
            id="ids without an index",
        ),
    ],
)
def test_parallel_calls_stay_separate(events: list[Any]) -> None:
    assert [(name, arguments.replace(" ", "")) for name, arguments in streamed(*events)] == TWO


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([call(0, "a", "add", ""), call(0, "b", None, '{"a":'), call(0, "b", None, "5}")], id="two ids"),
        pytest.param(
            [call(0, "a", "add", ""), call(0, "b", None, '{"a":'), call(0, "c", None, "5}")], id="an id a fragment"
        ),
        pytest.param(
            [call(0, "a", "add", '{"a":'), call(0, "b", "add", "5"), call(0, "c", "add", "}")],
            id="an id and a name a fragment",
        ),
        pytest.param([call(0, None, "add", ""), call(0, "b", None, '{"a":5}')], id="the id late"),
        pytest.param([call(0, "a", None, None), call(0, None, "add", '{"a":5}')], id="the name late"),
        pytest.param([call(0, "a", "ad", ""), call(0, None, "d", '{"a":5}')], id="the name in two pieces"),
        pytest.param([call(0, "a", "ad", ""), call(0, None, "add", '{"a":5}')], id="the name growing"),
        pytest.param([call(0, "a", "add", '{"a":'), call(0, "a", "add", "5}")], id="the name again"),
        pytest.param([call(0, "a", "add", '{"a":5}'), call(0, "a", "add", "")], id="the head again at the end"),
        pytest.param([call(0, "a", "add", '{"a":5}'), call(0, "a", "add", '{"a":5}')], id="all of it again"),
        pytest.param(
            [call(0, "a", "add", "{}"), call(0, None, None, '{"a":'), call(0, None, None, "5}")], id="{} first"
        ),
        pytest.param([call(None, "a", "add", '{"a":'), call(0, None, None, "5}")], id="the index late"),
        pytest.param([call(0, "a", "add", '{"a":'), call(None, None, None, "5}")], id="the index only at first"),
        pytest.param([{"index": 0, "function": None}, call(0, "a", "add", '{"a":5}')], id="function null"),
        pytest.param([{"index": 0, "id": "a", "name": "add", "arguments": '{"a":5}'}], id="no function"),
        pytest.param([None, "?", [None, 3], call(0, "a", "add", '{"a":5}'), {}], id="noise around"),
    ],
)
def test_one_call_stays_whole(events: list[Any]) -> None:
    assert streamed(*events) == [("add", '{"a":5}')]


def test_calls_of_a_whole_answer_are_never_merged() -> None:
    calls = ToolCalls()
    calls.add_whole([call(None, "c", "add", '{"a":1}'), call(0, "c", "add", '{"a":1}'), call(0, None, "add", "")])

    assert [each.name for each in calls.finished()] == ["add"] * 3
    assert calls.finished()[0].id == "c"


def test_fields_next_to_a_call_are_kept() -> None:
    calls = ToolCalls()
    signature = {"google": {"thought_signature": "SIG"}}
    calls.add_fragments(call(0, "x", "add", "", extra_content=signature, nothing=None))
    calls.add_fragments(call(0, None, None, "{}", cache=1, odd="half a pair \ud83d"))

    assert calls.finished()[0].extra == {"extra_content": signature, "cache": 1}


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("null", "{}"),
        (json.dumps('{"a": 5}'), '{"a": 5}'),
        (json.dumps("null"), "{}"),
        (json.dumps("a text"), json.dumps("a text")),
        ('"broken', '"broken'),
        ("", ""),
        ("{a:", "{a:"),
        ('{"a": 5}', '{"a": 5}'),
    ],
)
def test_arguments_of_another_form_become_an_object(written: str, plain: str) -> None:
    assert plain_arguments(written) == plain


@pytest.mark.parametrize(
    "fragments",
    [
        [call(n, f"c{n}", "add", "{}") for n in range(MAX_CALLS + 1)],
        [call(0, "x", "add", "x" * (MAX_CALL_BYTES // 4)) for _ in range(5)],
        [call(0, "x", "add", "", signature="x" * MAX_CALL_BYTES)],
        [call(0, "x", "n" * (MAX_CALL_BYTES + 1), "")],
    ],
)
def test_calls_without_end_are_a_failure(fragments: list[dict[str, Any]]) -> None:
    with pytest.raises(AgentFailed, match=r"more than 128 tools|longer than \d+ bytes"):
        streamed(*fragments)


@pytest.mark.parametrize("identity", [None, "x"])
@pytest.mark.parametrize("piece", ["xxxxxxxxx}", "xxxxxxxxxx", ""])
def test_names_in_many_fragments_are_joined_fast(identity: str | None, piece: str) -> None:
    began = time.thread_time()
    fragments = [call(0, identity, "add", '{"a":"')] + [call(0, identity, "add", piece)] * 15_000

    assert streamed(*fragments) == [("add", '{"a":"' + piece * 15_000)]
    assert time.thread_time() - began < 1.0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["{}", '{"a":1}']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["index", "id", "function", "name", "arguments", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(events=st.lists(JSON, max_size=6), whole=st.booleans())
def test_any_json_becomes_legible_calls_or_a_failure(events: list[Any], whole: bool) -> None:
    calls = ToolCalls()
    try:
        for each in events:
            (calls.add_whole if whole else calls.add_fragments)(each)
    except LoomError:
        return
    finished = calls.finished()
    assert len({each.id for each in finished}) == len(finished)
    json.dumps([each.extra for each in finished], allow_nan=False)
    assert all((each.name + each.arguments + each.id).encode() for each in finished)
