"""Names that programs written for loom-agent 0.6 import and call."""

from importlib import import_module

import msgspec
import pytest

import loom
from loom import (
    AgentConfig,
    ClusterConfig,
    ClusterManager,
    LoopContext,
    OpenAIProvider,
    RewardBus,
    Runtime,
    UserMessage,
    types,
)
from loom.schemas.errors import BY_CODE, InvalidTask, NoBids
from loom.schemas.llm import AssistantMessage, Message, SystemMessage
from loom.types import AgentNode, Bid, CapabilityProfile, RewardRecord, Skill, TaskAd

PATHS = {
    "loom.config": ["AgentConfig", "ClusterConfig"],
    "loom.providers.openai": ["OpenAIProvider"],
    "loom.providers": ["OpenAIProvider"],
    "loom.agent": ["Agent"],
    "loom.agent.strategy": ["LoopContext"],
    "loom.cluster.amoeba_loop": ["AmoebaLoop"],
    "loom.cluster.lifecycle": ["LifecycleManager"],
    "loom.cluster.manager": ["ClusterManager"],
    "loom.cluster.planner": ["TaskPlanner"],
    "loom.cluster.reward": ["RewardBus"],
    "loom.cluster.skill_registry": ["SkillNodeRegistry"],
    "loom.runtime.core": ["Runtime"],
    "loom.events": ["EventBus", "DoneEvent", "TextDeltaEvent"],
}

WITHOUT_EFFECT = (
    *("provider", "tools", "tool_registry", "tool_config", "tool_context", "max_steps", "streaming", "temperature"),
    *("max_tokens", "session_id", "tenant_id", "agent_id", "interceptors", "events", "signal"),
)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in PATHS.items() for name in names])
def test_an_import_path_leads_to_the_class_of_the_front_door(path: str, name: str) -> None:
    assert getattr(import_module(path), name) is getattr(loom, name)


def test_event_types_have_their_names_with_event_in_loom_and_in_its_types() -> None:
    for name in ("TextDelta", "ReasoningDelta", "ToolCallStart", "ToolCallEnd", "StepStart", "StepEnd", "Done"):
        assert getattr(loom, f"{name}Event") is getattr(types, f"{name}Event") is getattr(types, name)


def test_errors_have_their_names() -> None:
    errors = import_module("loom.errors")

    assert errors.AuctionNoWinnerError is NoBids
    assert errors.ApoptosisRejectedError is errors.ApoptosisRejected
    assert errors.LoomError is loom.LoomError
    assert set(errors.__all__) <= set(dir(errors))


def test_the_errors_module_has_every_error_of_the_wire() -> None:
    codes = {cls.__name__ for cls in BY_CODE.values()}

    assert codes <= set(import_module("loom.errors").__all__)


def test_a_context_takes_the_keywords_that_have_no_effect() -> None:
    unused = dict.fromkeys(WITHOUT_EFFECT)
    context = LoopContext(messages=[UserMessage(content="sort")], **unused)

    assert len(unused) == 15
    assert context.to_ad().description == "sort"
    with pytest.raises(TypeError, match="mesages"):
        LoopContext(mesages=[])  # type: ignore[call-arg]


def test_messages_are_known_by_their_role() -> None:
    message = UserMessage(content="hi")

    assert message == Message(role="user", content="hi")
    assert isinstance(message, UserMessage)  # type: ignore[arg-type]  # a callable that knows its messages
    assert not isinstance(message, SystemMessage)  # type: ignore[arg-type]
    assert not isinstance("hi", UserMessage)  # type: ignore[arg-type]
    assert isinstance(Message(role="assistant"), AssistantMessage)  # type: ignore[arg-type]


def test_records_bids_and_clusters_need_no_arguments() -> None:
    assert (RewardRecord().reward, Bid().score) == (0.0, 0.0)
    assert ClusterManager(ClusterConfig(max_nodes=3)).config.max_nodes == 3


def test_the_ad_comes_first_in_the_reward_formulas_and_success_is_positional() -> None:
    bus, node = RewardBus(), AgentNode(id="a", capabilities=CapabilityProfile(scores={"code": 0.5}))
    ad = TaskAd(domain="code", description="x", token_budget=1000)

    assert bus.compute_signal(ad, True, 500, 0).efficiency == 0.5
    assert bus.compute_signal(ad, False, 0, 0).total == 0
    assert bus.evaluate(node, ad, True, 500, 0) == pytest.approx(0.5 * 0.7 + 0.3 * 0.5 + 0.2)
    assert ClusterManager().compute_bid(node=node, task=ad).score > 0


def test_idle_timeout_is_another_name_and_settings_without_a_counterpart_are_explained() -> None:
    config = ClusterConfig(idle_timeout=60)  # type: ignore[call-arg]

    assert config.idle_timeout == config.idle_timeout_s == 60
    assert config == ClusterConfig(idle_timeout_s=60)
    assert msgspec.json.decode(msgspec.json.encode(config), type=ClusterConfig) == config
    for name in ("bid_weights", "blueprint_forge_enabled", "fallback_strategy"):
        with pytest.raises(TypeError, match=f"ClusterConfig has no {name}: "):
            ClusterConfig(**{name: None})
    with pytest.raises(TypeError, match="max_node"):
        ClusterConfig(max_node=3)  # type: ignore[call-arg]


def test_a_decay_rate_is_refused_with_its_reason() -> None:
    assert RewardBus(0.5).alpha == 0.5
    with pytest.raises(TypeError, match="half_life_days"):
        RewardBus(0.3, 0.01)  # type: ignore[arg-type]


def test_a_runtime_takes_its_arguments_by_position_and_makes_loops_and_nodes_of_skills() -> None:
    provider = OpenAIProvider(AgentConfig(api_key="test"))
    rt = Runtime(provider, AgentConfig(system_prompt="Be brief."), ClusterConfig(max_nodes=3))
    node = rt.load_skill(Skill(name="coder", instructions="You write Python."))

    assert rt.cluster.config.max_nodes == rt.lifecycle.config.max_nodes == 3
    assert rt.cluster.nodes == [node]
    assert (node.id, node.capabilities.scores, node.agent.system_prompt) == (
        "skill-coder",
        {"coder": 0.7},
        "You write Python.",
    )
    assert rt.skill_registry.is_loaded("coder")
    assert rt.amoeba_loop().cluster is rt.cluster


def test_a_skill_with_missing_tools_is_not_loaded() -> None:
    rt = Runtime(OpenAIProvider(AgentConfig(api_key="test")))

    with pytest.raises(loom.LoomError, match="not in the skill_registry: search"):
        rt.load_skill(Skill(name="coder", tools=["search"]))
    assert rt.cluster.nodes == []
    for call in (Runtime().amoeba_loop, lambda: Runtime().load_skill(Skill(name="coder"))):
        with pytest.raises(loom.LoomError, match="no provider"):
            call()


def test_an_ad_without_work_is_still_refused() -> None:
    with pytest.raises(InvalidTask):
        LoopContext().to_ad()
