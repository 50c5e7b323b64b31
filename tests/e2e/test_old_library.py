"""Programs written for loom-agent 0.6 run: each of examples/old_library uses every import and call of its part."""

from pathlib import Path

import pytest
from support.openai_server import OpenAIServer
from support.programs import output_of

PROGRAMS = Path(__file__).parents[2] / "examples" / "old_library"


async def lines_of(program: str, model: OpenAIServer | None = None) -> list[str]:
    return (await output_of(str(PROGRAMS / program), model=model)).splitlines()


async def test_the_cluster_manager_auctions_divides_and_retires_nodes() -> None:
    lines = await lines_of("cluster_manager.py")

    assert lines[1] == "coder bids 0.860: capability 0.90, availability 1.00, history 0.50, tools 1.00"
    assert lines[4:] == [
        "winner: coder - split: True",
        "winner while the coder is busy: analyst",
        "mitosis: depth 1, parent coder, 4 nodes",
        "writer now claims 0.95",
        "apoptosis: writer leaves its scores to analyst",
        "idle: True - left: 3",
        "coder: healthy, keep",
        "analyst: healthy, keep",
    ]


async def test_the_reward_bus_learns_from_runs() -> None:
    assert await lines_of("reward_bus.py") == [
        "quality 0.70, efficiency 0.80, reliability 1.00",
        "reward 0.79",
        "a failure earns 0.00, however few tokens it took",
        "0.79 -> code 0.587, success rate 0.650",
        "0.53 -> code 0.570, success rate 0.755",
        "0.00 -> code 0.399, success rate 0.528",
        "0.82 -> code 0.525, success rate 0.670",
        "4 tasks, 0 losses in a row",
        "4 records, the newest 0.82 in code",
        "TypeError: RewardBus has no decay_rate",
    ]


@pytest.mark.slow
async def test_the_runtime_answers_by_its_nodes_and_skills(model: OpenAIServer) -> None:
    assert await lines_of("runtime.py", model) == [
        "nodes: 3 - idle: True",
        "You wrote: Sort a list",
        "You wrote: Translate: hello",
        "AuctionNoWinnerError: no_bids",
    ]
    systems = [request.messages[0]["content"] for request in model.requests]
    assert systems == ["You are brief.", "You translate."]


@pytest.mark.slow
async def test_the_amoeba_loop_reports_text_phases_and_its_end(model: OpenAIServer) -> None:
    lines = await lines_of("amoeba_loop.py", model)

    assert lines[:3] == ["[sense] code", "[match] coder", "[scale] "]
    assert lines[3].startswith("You wrote: Write a Python function that sorts a list")
    assert lines[3].endswith("[execute] coder")
    assert lines[4:] == [
        "[evaluate] coder",
        "[adapt] coder",
        "done: steps=1, whole milliseconds: True",
        "handlers: step_start, step_end, done",
    ]
