"""The `accept` of an ad reaches agents and models, and text around a model's JSON does not fail it."""

from typing import Any

import pytest
from support.openai_server import OpenAIServer, Reply

from loom import Agent, OpenAIProvider, Runtime, TaskAd
from loom.bus.bus import Bus
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskResult
from loom.types import Accept, CapabilityProfile

SCHEMA = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"]}


async def result_of(agent: Any, accept: Accept) -> TaskResult:
    rt = Runtime()
    rt.add_agent(agent, name="n", capabilities=CapabilityProfile(scores={"net": 0.9}))
    async with rt:
        ad = TaskAd(domain="net", description="Which port?", estimated_complexity=0.1, accept=accept, timeout_s=20)
        return await (await rt.publish(ad)).result()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ['```json\n{"port": 80}\n```', '<think>ok</think>{"port": 80}', 'It is {"port": 80}, I think.']
)
async def test_json_that_a_model_wraps_is_accepted(
    phases: Bus, model: OpenAIServer, provider: OpenAIProvider, text: str
) -> None:
    model.script(Reply(text=text))
    result = await result_of(Agent(provider), Accept(json_schema=SCHEMA))

    assert (result.state, result.content, result.attempts) == ("succeeded", '{"port": 80}', 1)
    assert model.requests[0].body["response_format"]["json_schema"]["schema"] == SCHEMA
    await provider.aclose()


async def test_a_function_reads_the_accepted_answers(phases: Bus) -> None:
    async def serve(job: RunRequest) -> str:
        assert job.accept is not None
        return f"the answer has {job.accept.contains[0]}"

    result = await result_of(serve, Accept(contains=("port 80",)))

    assert result.content == "the answer has port 80"
