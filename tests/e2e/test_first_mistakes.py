"""The mistakes of a first hour with Python, each answered by one sentence with the fix."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loom import AgentConfig, OpenAIProvider, Runtime, TaskAd
from loom.runner.cli.input_files import InvalidFile, load_node_file
from loom.schemas.errors import InvalidTask, LoomError, RejectedResult
from loom.types import Accept, AgentNode, CapabilityProfile, ClusterConfig, Limits


class Answers:
    async def run(self, text: str) -> str:
        return text


def add(agent: Any, **facts: Any) -> Callable[[], object]:
    def call() -> object:
        rt = Runtime()
        rt.add_agent(lambda text: text, name="worker")
        return rt.add_agent(agent, **facts)

    return call


BUILDING: dict[str, tuple[Callable[[], object], str]] = {
    "an ad's text without its name": (
        lambda: TaskAd("count the words"),
        "TaskAd takes its fields by name: write TaskAd(description=…)",
    ),
    "a misspelt field": (
        lambda: TaskAd(descripton="x"),
        "TaskAd has no field `descripton`; did you mean `description`?",
    ),
    "timeout": (
        lambda: TaskAd(description="x", timeout=30),
        "TaskAd has no field `timeout`; did you mean `timeout_s`?",
    ),
    "a field of nothing known": (
        lambda: TaskAd(prompt="x"),
        (
            "TaskAd has no field `prompt`; there are: task_id, domain, description, estimated_complexity, priority, "
            "required_tools, tools_allowed, token_budget, timeout_s, node_id, accept, limits, context, labels, wait"
        ),
    ),
    "a misspelt criterion": (
        lambda: Accept(contain=["x"]),
        "Accept has no field `contain`; did you mean `contains`?",
    ),
    "a misspelt limit": (
        lambda: Limits(depth=1),
        "Limits has no field `depth`; there are: max_depth, mitosis_threshold",
    ),
    "a text as timeout": (
        lambda: TaskAd(description="x", timeout_s="30"),
        "timeout_s must be a number of seconds, more than 0 and at most 86400",
    ),
    "a misspelt setting": (
        lambda: AgentConfig(max_token=5),
        "AgentConfig has no field `max_token`; did you mean `max_tokens`?",
    ),
    "a model without its name": (
        lambda: AgentConfig("gpt-4o"),
        "AgentConfig takes its fields by name: write AgentConfig(model=…)",
    ),
    "a misspelt rule of the cluster": (
        lambda: ClusterConfig(max_attempt=3),
        "ClusterConfig has no field `max_attempt`; did you mean `max_attempts`?",
    ),
    "a config before the provider": (
        lambda: Runtime(AgentConfig()),
        "an AgentConfig is not a provider, which comes first: write Runtime(OpenAIProvider(config), config)",
    ),
    "the cluster's config as provider": (
        lambda: Runtime(ClusterConfig()),
        "a ClusterConfig is not a provider: write Runtime(cluster_config=…)",
    ),
    "the cluster's config as config": (
        lambda: Runtime(None, ClusterConfig()),
        "a ClusterConfig is not the config of agents: write Runtime(cluster_config=…)",
    ),
    "an agent's config as the cluster's": (
        lambda: Runtime(cluster_config=AgentConfig()),
        "cluster_config cannot be a AgentConfig: write ClusterConfig(max_attempts=…)",
    ),
    "a class as provider": (
        lambda: Runtime(OpenAIProvider),
        "the class OpenAIProvider is not a provider: give an object of it, OpenAIProvider(…)",
    ),
    "a model's name as provider": (
        lambda: Runtime("gpt-4o"),
        (
            "a str is not a provider: write Runtime(OpenAIProvider(config), config) with "
            "config = AgentConfig(model=…), or give an object with `complete` and `stream`"
        ),
    ),
    "a model's name in place of a config": (
        lambda: OpenAIProvider("gpt-4o"),
        "a str is not a config: write OpenAIProvider(AgentConfig(model=…))",
    ),
    "a provider of one agent that is none": (
        add(None, provider=AgentConfig()),
        "an AgentConfig is not a provider, which comes first: write Runtime(OpenAIProvider(config), config)",
    ),
    "a class as agent": (add(Answers), "the class Answers is not an agent: give an object of it, Answers(…)"),
    "a prompt as agent": (
        add("You are helpful."),
        "a str is not an agent: give a function of one argument, an object with stream(job), or one with run(text)",
    ),
    "a name twice": (
        add(lambda text: text, name="worker"),
        "there is another node worker: choose another name, pass replace=True, or call remove_agent('worker') first",
    ),
    "a rating of 9": (
        add(lambda text: text, capabilities={"code": 9}),
        "the node has the rating 9 in 'code': give a number from 0 (useless) to 1 (expert)",
    ),
    "a rating of 9 in a profile": (
        add(lambda text: text, capabilities=CapabilityProfile({"code": 9})),
        "the node has the rating 9 in 'code': give a number from 0 (useless) to 1 (expert)",
    ),
    "a list of capabilities": (
        add(lambda text: text, capabilities=["code"]),
        'the node has capabilities that are a list: give a dict such as {"code": 0.9}',
    ),
    "neither agent nor provider": (
        add(None),
        "no provider: pass one to Runtime or add_agent, or an agent or function to add_agent",
    ),
}


@pytest.mark.parametrize("mistake", BUILDING)
def test_a_mistake_in_building_is_answered_at_once(mistake: str) -> None:
    call, sentence = BUILDING[mistake]
    with pytest.raises((LoomError, TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == sentence
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "one sentence, not two tracebacks"


def test_a_capability_given_as_a_dict_is_accepted() -> None:
    rt = Runtime()
    node = rt.add_agent(lambda text: text, name="worker", capabilities={"code": 0.9})
    assert node.capabilities.scores == {"code": 0.9}


WRONG_TASKS: dict[str, tuple[Any, str]] = {
    "a number": (5, "a int is not a task: give a TaskAd, a dict of its fields, or a text"),
    "an empty text": ("", "description is empty: describe the work"),
    "a misspelt key": ({"descripton": "x"}, "unknown field `descripton`; did you mean `description`?"),
    "a misspelt key inside": (
        {"description": "x", "accept": {"contain": ["y"]}},
        "unknown field `contain`; did you mean `contains`?",
    ),
    "timeout": ({"description": "x", "timeout": 30}, "unknown field `timeout`; did you mean `timeout_s`?"),
    "an unknown priority": (
        TaskAd(description="x", priority="urgent"),
        "priority must be one of low, normal, high, critical",
    ),
    "a text to accept": (
        TaskAd(description="x", accept="Paris"),
        'accept must be an object such as {"contains": ["total"]}',
    ),
    "a text as context": (
        TaskAd(description="x", context="sales.csv"),
        'context must be a JSON object, such as {"file": "sales.csv"}',
    ),
    "a text as tools": (
        TaskAd(description="x", required_tools="search"),
        "required_tools must be a list of names, at most 32 of 1 to 64 characters",
    ),
    "a pin with a space": (
        TaskAd(description="x", node_id="a b"),
        "node_id must be NODE or OWNER.NODE, each 1 to 64 letters, digits, _ or -",
    ),
}


@pytest.mark.usefixtures("on_bus", "phases")
async def test_a_mistake_in_a_task_is_answered_by_its_submit() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text, name="worker")
    async with rt:
        for mistake, (task, sentence) in WRONG_TASKS.items():
            with pytest.raises(InvalidTask) as caught:
                await rt.submit(task)
            assert caught.value.message == sentence, mistake
        for several in ("hello", {"description": "x"}, TaskAd(description="x")):
            with pytest.raises(InvalidTask, match=r"is not a list of tasks: write submit_many\(\[task, …\]\)"):
                await rt.submit_many(several)
        with pytest.raises(LoomError, match=r"submit_sync would block the event loop .* use `await rt.submit"):
            rt.submit_sync("hello")


@pytest.mark.usefixtures("on_bus", "phases")
async def test_a_mistake_in_feedback_names_the_scale() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text, name="worker")
    async with rt:
        handle = await rt.publish("hello")
        await handle.result()
        for wrong, shown in ((5, "5"), (float("nan"), "nan"), ("good", "a str"), (True, "1")):
            with pytest.raises(InvalidTask) as caught:
                await rt.feedback(handle.task_id, wrong)
            assert caught.value.message == f"score must be from 0 to 1, not {shown}: 0 is useless, 1 perfect"
        with pytest.raises(InvalidTask, match="task_id must be a text, not a TaskHandle"):
            await rt.feedback(handle, 1.0)


@pytest.mark.usefixtures("on_bus", "phases")
async def test_a_misspelt_domain_is_answered_with_the_nearest_one() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text, name="seller", capabilities={"sales": 0.9})
    rt.add_agent(lambda text: text, name="reader", domains=["books"])
    async with rt:
        result = await (await rt.publish(TaskAd(domain="sael", description="x"))).result()
    assert result.warnings == ("no node rates itself in 'sael'; did you mean 'sales'?",)


@pytest.mark.usefixtures("on_bus", "phases")
async def test_an_answer_that_is_not_accepted_is_an_error_that_has_it() -> None:
    rt = Runtime()
    rt.add_agent(lambda text: text, name="worker")
    async with rt:
        with pytest.raises(RejectedResult, match="does not contain 'total'") as caught:
            await rt.submit({"description": "add it up", "accept": {"contains": ["total"]}})
    assert caught.value.partial == "add it up"


def test_a_forgotten_await_gives_pythons_warning_and_the_docstring_names_the_sync_way() -> None:
    with pytest.warns(RuntimeWarning, match="'Runtime.submit' was never awaited"):
        str(Runtime().submit("hello"))
    assert "submit_sync" in (Runtime.submit.__doc__ or "").splitlines()[0]


NODE_FILES = {
    "x = 1": "defines no `nodes`; give it a list of AgentNode",
    "agents = []": "defines no `nodes`; give it a list of AgentNode",
    "nodes = [1]": "nodes[0] is a int without `id`; make it an AgentNode",
}


@pytest.mark.parametrize("source", NODE_FILES)
def test_a_file_without_nodes_is_refused_with_its_requirements(source: str, tmp_path: Path) -> None:
    file = tmp_path / "agents.py"
    file.write_text(source)
    with pytest.raises(InvalidFile, match=re.escape(NODE_FILES[source])):
        load_node_file(file)


def test_a_node_in_place_of_an_agent_is_refused_with_the_right_call() -> None:
    with pytest.raises(LoomError, match=r"is a node already: add it by rt.cluster.add_node\(node\)"):
        Runtime().add_agent(AgentNode(agent=lambda text: text))
