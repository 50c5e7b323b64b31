"""The turns of a conversation reach a model as messages, from any client."""

from typing import Any

import pytest
from support.agents import Scripted, events_of

from loom.agents.function_agent import as_agent
from loom.agents.llm.agent import Agent
from loom.agents.llm.prompt import job_message
from loom.agents.protocol import collect
from loom.schemas.base import decode, encode
from loom.schemas.decoding.conversation import MAX_TURNS
from loom.schemas.llm import AssistantMessage, Message, SystemMessage, UserMessage
from loom.schemas.run import RunRequest

NAME = [{"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hello Ada."}]


def job(conversation: Any, **context: Any) -> RunRequest:
    return RunRequest(task_id="t1", description="Who am I?", context={"conversation": conversation, **context})


async def asked(request: RunRequest, system_prompt: str = "") -> tuple[Message, ...]:
    """Return the messages of the first request for a job."""
    provider = Scripted(["Ada"])
    await events_of(Agent(provider, system_prompt=system_prompt), request)
    return provider.asked[0].messages


def test_a_jobs_messages_are_its_earlier_turns_and_its_description() -> None:
    turns = (UserMessage("I am Ada."), AssistantMessage("Hello Ada."), UserMessage("Who am I?"))

    assert job(NAME).messages == turns
    assert decode(encode(job(NAME)), RunRequest).messages == turns


def test_a_job_without_a_conversation_has_one_message() -> None:
    assert RunRequest(task_id="t1", description="Hi").messages == (UserMessage("Hi"),)


@pytest.mark.parametrize(
    "conversation",
    [
        None,
        7,
        "a text",
        {"role": "user", "content": "x"},
        [None, 7, "x", []],
        [{"role": "tool", "content": "x"}, {"role": 7, "content": "x"}, {"role": ["user"], "content": "x"}],
        [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": "  "}],
        [{"role": "user", "content": [{"type": "image_url"}, {"text": 7}, 7]}],
    ],
)
def test_a_value_that_is_not_a_turn_is_left_out(conversation: Any) -> None:
    request = job(conversation)

    assert request.messages == (UserMessage("Who am I?"),)
    assert '"conversation":' in job_message(request)


def test_the_readable_turns_of_a_conversation_are_read() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}]}
    mixed = [7, parts, {"role": "function", "content": "x"}, {"role": "system", "content": "Be brief.", "name": "x"}]

    assert job(mixed).messages[:-1] == (UserMessage("a\nb"), SystemMessage("Be brief."))


def test_of_a_long_conversation_the_newest_turns_are_read() -> None:
    turns = [{"role": "user", "content": str(n)} for n in range(MAX_TURNS + 10)]
    messages = job(turns).messages

    assert len(messages) == MAX_TURNS + 1
    assert messages[0].content == "10"


async def test_an_agent_sends_the_turns_as_messages_and_the_rest_of_the_context_as_json() -> None:
    *turns, last = await asked(job(NAME, lang="de"))

    assert turns == [UserMessage("I am Ada."), AssistantMessage("Hello Ada.")]
    assert last == UserMessage('Who am I?\n\nContext, as JSON:\n{"lang":"de"}')


async def test_system_turns_follow_the_agents_own_prompt_in_one_message() -> None:
    messages = await asked(job([{"role": "system", "content": "In verse."}, *NAME]), system_prompt="Be kind.")

    assert messages[0] == SystemMessage("Be kind.\n\nIn verse.")
    assert [each.role for each in messages] == ["system", "user", "assistant", "user"]


async def test_turns_of_one_role_in_a_row_are_joined() -> None:
    messages = await asked(job([{"role": "user", "content": "I am Ada."}]))

    assert messages == (UserMessage("I am Ada.\n\nWho am I?"),)


async def test_turns_hold_no_half_surrogate_pairs() -> None:
    messages = await asked(job([{"role": "assistant", "content": "a\ud83d"}]))

    assert messages[0].content == "a?"


async def test_a_function_reads_the_turns_of_its_job() -> None:
    def count(job: RunRequest) -> str:
        return " / ".join(f"{turn.role}: {turn.content}" for turn in job.messages)

    result = await collect(as_agent(count), job(NAME))

    assert result.content == "user: I am Ada. / assistant: Hello Ada. / user: Who am I?"
