import pytest
from support.agents import JOB, MakeAgent, add, events_of
from support.openai_server import OpenAIServer, Reply

from loom.schemas.errors import AgentFailed


@pytest.mark.parametrize("reply", [Reply(text=""), Reply(text="  "), Reply(tool_calls=(("add", "{}"),))])
async def test_an_end_without_any_text_is_a_failure(server: OpenAIServer, make: MakeAgent, reply: Reply) -> None:
    server.script(reply)
    with pytest.raises(AgentFailed, match="without an answer"):
        await events_of(make(add, max_steps=1))


async def test_a_stream_without_an_end_is_a_failure(server: OpenAIServer, make: MakeAgent) -> None:
    server.script(Reply(text="half an ans", finish_reason=None))
    with pytest.raises(AgentFailed, match="broke off") as caught:
        await events_of(make())

    assert caught.value.partial == "half an ans"


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_of_nothing_is_a_failure(server: OpenAIServer, make: MakeAgent, streaming: bool) -> None:
    server.script(Reply(events=('{"choices": []}',)) if streaming else Reply(text="x", no_choices=True))
    with pytest.raises(AgentFailed):
        await make(stream=streaming).run(JOB)


async def test_an_answer_of_full_length_is_accepted_and_a_withheld_one_is_not(
    server: OpenAIServer, make: MakeAgent
) -> None:
    server.script(Reply(text="to be contin", finish_reason="length"), Reply(text="b", finish_reason="content_filter"))

    assert (await make().run(JOB)).content == "to be contin"
    with pytest.raises(AgentFailed, match="withheld"):
        await make().run(JOB)
