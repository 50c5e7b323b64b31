"""Requests of the phases to a model: none for facts given in the ad, and all of them counted in the result."""

import json
from collections.abc import AsyncIterator

import pytest
from support.openai_server import OpenAIServer, Reply, Request
from support.services import running_phases

from loom import OpenAIProvider, Runtime, TaskAd
from loom.agents.llm.agent import Agent
from loom.schemas.config import ClusterConfig
from loom.types import Accept, CapabilityProfile, TaskResult


@pytest.fixture
async def runtime(on_bus: tuple[str, str], provider: OpenAIProvider) -> AsyncIterator[Runtime]:
    """Phases with a model, and a node whose agent is a model."""
    url, namespace = on_bus
    async with running_phases(url, namespace=namespace, llm=provider):
        rt = Runtime(provider=provider)
        rt.add_agent(Agent(provider=provider), name="n1", capabilities=CapabilityProfile(scores={"code": 0.9}))
        async with rt:
            yield rt


def ad(**facts: object) -> TaskAd:
    return TaskAd(**{"domain": "code", "description": "Ruminate.", "estimated_complexity": 0.2, **facts})  # type: ignore[arg-type]  # fields of an ad


async def ended(rt: Runtime, task: TaskAd) -> TaskResult:
    return await (await rt.publish(task)).result()


@pytest.mark.slow
async def test_an_ad_that_names_domain_and_complexity_makes_one_request(runtime: Runtime, model: OpenAIServer) -> None:
    result = await ended(runtime, ad())
    assert (result.success, result.usage.phases, result.warnings) == (True, {}, ())
    assert len(model.requests) == 1


async def test_a_vague_ad_makes_two_requests_and_the_phases_tokens_are_separate(
    runtime: Runtime, model: OpenAIServer
) -> None:
    model.script(
        Reply(text='{"complexity": 0.2, "domains": ["code"]}', usage=(40, 9)), Reply(text="done", usage=(20, 3))
    )
    result = await ended(runtime, ad(domain="", estimated_complexity=None))
    assert len(model.requests) == 2
    assert (result.prompt_tokens, result.completion_tokens, result.estimated_usage) == (20, 3, False)
    sense = result.usage.phases["sense"]
    assert (sense.requests, sense.prompt_tokens, sense.completion_tokens, sense.estimated) == (1, 40, 9, False)
    assert list(result.usage.phases) == ["sense"]


async def test_a_rubric_makes_two(runtime: Runtime, model: OpenAIServer) -> None:
    model.script(Reply(text="done", usage=(20, 3)), Reply(text='{"score": "9/10", "reason": "good"}', usage=(30, 8)))
    result = await ended(runtime, ad(accept=Accept(rubric="Is it done?"), token_budget=5000))
    assert (result.success, result.score, result.warnings) == (True, 0.9, ())
    assert (len(model.requests), result.usage.phases["evaluate"].tokens) == (2, 38)


@pytest.mark.parametrize(
    ("refusal", "requests"),
    [
        # The provider mends such a request by itself.
        (Reply(status=400, body=json.dumps({"error": {"message": "This response_format type is unavailable now"}})), 1),
        (Reply(text="", finish_reason="length"), 2),
        (Reply(text="I would say eight"), 2),
    ],
)
async def test_a_judge_that_cannot_take_a_response_format_is_asked_without_one(
    runtime: Runtime, model: OpenAIServer, refusal: Reply, requests: int
) -> None:
    model.script(Reply(text="done"), refusal, Reply(text='<think>{"score": 1}</think>{"score": 0.7, "reason": null}'))
    result = await ended(runtime, ad(accept=Accept(rubric="Is it done?")))
    assert (result.score, result.usage.phases["evaluate"].requests, result.warnings) == (0.7, requests, ())
    assert model.requests[-1].body.get("response_format", {}).get("type") != "json_schema"


async def test_a_judge_without_a_clear_opinion_gives_no_score(runtime: Runtime, model: OpenAIServer) -> None:
    def unclear(request: Request) -> Reply:
        judging = "You judge" in str(request.messages[0]["content"])
        return Reply(text='{"score": 8, "reason": "good"}' if judging else "done")

    model.answer = unclear
    result = await ended(runtime, ad(accept=Accept(rubric="Is it done?")))
    assert (result.success, result.score) == (True, None)
    assert result.warnings == (
        "the judge could not be asked: its answer could not be read; its rubric was not checked",
    )


@pytest.mark.slow
async def test_tokens_of_failed_attempts_are_reported_on_success_and_on_failure(
    on_bus: tuple[str, str], model: OpenAIServer, provider: OpenAIProvider
) -> None:
    url, namespace = on_bus
    withheld, good = (
        Reply(text="part", finish_reason="content_filter", usage=(100, 50)),
        Reply(text="x", usage=(100, 50)),
    )
    async with running_phases(url, namespace=namespace, config=ClusterConfig(max_attempts=2)):
        rt = Runtime(provider=provider)
        for name in ("n1", "n2"):
            rt.add_agent(Agent(provider=provider), name=name, capabilities=CapabilityProfile(scores={"code": 0.9}))
        async with rt:
            model.script(withheld, good)
            result = await ended(rt, ad())
            assert (result.success, result.prompt_tokens, result.completion_tokens) == (True, 200, 100)
            model.script(withheld, withheld)
            result = await ended(rt, ad())
            assert (result.state, result.prompt_tokens, result.completion_tokens) == ("failed", 200, 100)
