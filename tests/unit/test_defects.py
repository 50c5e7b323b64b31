"""The classes of defect that an in-process library of this kind had, and the tests that keep each of them out.

Most tests are in other modules, next to the code they test. The tests here follow one run through agent, judge and
profile.
"""

import ast
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.openai_server import OpenAIServer, Reply

from loom.agents.function_agent import FunctionAgent
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.agents.protocol import StreamingAgent, collect, failure_of
from loom.phases.adapt.evidence import apply_reward
from loom.phases.evaluate.retry_policy import Finish, decide
from loom.phases.evaluate.rewards import reward_for
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.errors import LoomError
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.run import RunRequest

TESTS = Path(__file__).parents[1]
COVERED = {
    "a failure of the model counted as a success": [
        "unit/test_defects.py::test_every_failure_of_a_model_is_a_loss_in_the_profile",
        "unit/test_agent_providers.py::test_every_exception_of_a_provider_is_a_failure",
        "unit/test_agent_answers.py::test_an_end_without_any_text_is_a_failure",
        "unit/test_retry_policy.py::test_an_empty_result_is_refused",
        "chaos/test_llm_faults.py::test_every_fault_of_a_model_ends_the_task_as_it_should",
    ],
    "unused nodes that die on the first submit": [
        "unit/test_lifecycle.py::test_a_first_task_leaves_unused_nodes_alone",
        "unit/test_lifecycle.py::test_a_node_without_history_is_healthy_however_long_it_idles",
        "unit/test_retirement_policy.py::test_a_node_without_history_or_at_the_threshold_is_not_retired",
        "e2e/test_runtime.py::test_unused_nodes_stay_healthy",
    ],
    "streamed runs that cost nothing": [
        "unit/test_defects.py::test_a_streamed_run_costs_the_same_as_a_whole_one",
        "unit/test_agent_limits.py::test_cost_is_estimated_when_the_model_reports_no_usage",
        "unit/test_openai_provider.py::test_a_streamed_answer_comes_in_pieces_and_ends_with_usage_and_reason",
    ],
    "failing fast that pays": [
        "unit/test_reward_formulas.py::test_a_failure_earns_nothing_however_fast",
        "unit/test_retry_policy.py::test_a_failure_scores_zero_if_the_node_is_at_fault_and_otherwise_gives_no_reward",
    ],
    "decay that is a cliff": [
        "unit/test_reward_formulas.py::test_the_decay_of_a_day_is_small_and_continuous",
        "unit/test_reward_formulas.py::test_a_claim_without_any_reward_does_not_fade",
        "unit/test_scoring.py::test_idle_knowledge_fades_towards_the_claim",
    ],
    "losses counted twice": [
        "unit/test_defects.py::test_a_loss_is_counted_once_despite_repeated_delivery",
        "unit/test_reward_formulas.py::test_a_loss_counts_once_and_a_success_ends_the_row",
        "chaos/test_learning_kills.py::test_profiles_equal_a_rebuild_while_adapt_match_and_evaluate_are_killed",
    ],
    "all failures going to one node": ["unit/test_learning.py::test_sixty_failures_in_a_row_do_not_all_go_to_one_node"],
    "calibration under the wrong key": [
        "e2e/test_learning.py::test_a_domains_bias_is_read_under_the_key_it_is_written_under"
    ],
    "outputs that are not passed along": [
        "bus/test_plans.py::test_a_waiting_subtask_begins_as_soon_as_its_own_needs_are_met",
        "unit/test_planner.py::test_dependents_get_the_outputs_of_their_dependencies_and_no_others",
        "unit/test_agent.py::test_the_request_has_prompt_task_context_and_inputs",
        "e2e/test_division.py::test_a_diamond_runs_on_two_node_processes_and_is_put_together",
    ],
    "memories mixed between tasks at the same time": [
        "unit/test_agent.py::test_concurrent_jobs_are_isolated",
        "bus/test_host.py::test_two_tasks_at_once_never_see_each_others_text",
    ],
    "an idle novice beating a better busy expert": [
        "unit/test_cluster_manager.py::test_a_busy_expert_beats_an_idle_novice",
        "unit/test_learning.py::test_an_idle_novice_does_not_beat_a_better_busy_expert_on_claims_alone",
        "unit/test_learning.py::test_a_much_better_busy_node_with_room_beats_a_bad_idle_one",
    ],
}
"""Class of defect -> the tests against it."""


@pytest.mark.parametrize("defect", COVERED)
def test_every_test_against_a_defect_exists(defect: str) -> None:
    for path, _, name in (where.partition("::") for where in COVERED[defect]):
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as running:
        yield running


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    provider = OpenAIProvider(AgentConfig(api_key="k", base_url=server.base_url))
    yield provider
    await provider.aclose()


async def ended(agent: StreamingAgent) -> Envelope:
    """Return the ended task after its only attempt by this agent."""
    task = awarded(envelope(ad("What is 2 + 3?", token_budget=10_000), now=0))
    job = RunRequest(task_id=task.task_id, attempt=1, description="What is 2 + 3?", remaining_s=2)
    try:
        ran = replace(task, result=await collect(agent, job))
    except LoomError as error:
        ran = replace(task, error=failure_of(error, RunRequest(task_id="t1", node_id="n1", description="x")))
    end = decide(ran, ClusterConfig(max_attempts=1), 0)
    assert isinstance(end, Finish)
    return end.envelope


def learned(*tasks: Envelope) -> tuple[NodeProfile, list[Reward]]:
    """Return the profile of the node after these tasks, and its rewards for them."""
    profile, rewards = NodeProfile(node_id="n1"), []
    for seq, task in enumerate(tasks, 1):
        reward = reward_for(task, task.error, float(seq))
        assert reward is not None
        profile = apply_reward(profile, reward, seq)
        rewards.append(reward)
    return profile, rewards


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=401, body='{"error": {"message": "no such key"}}'),
        Reply(status=400, body='{"error": {"message": "no such model"}}'),
        Reply(text=""),
        Reply(text="   "),
        Reply(text="withheld", finish_reason="content_filter"),
    ],
    ids=["401", "400", "nothing", "blank", "withheld"],
)
async def test_every_failure_of_a_model_is_a_loss_in_the_profile(
    server: OpenAIServer, provider: OpenAIProvider, reply: Reply, streaming: bool
) -> None:
    server.answer = lambda _request: reply
    profile, [reward] = learned(await ended(Agent(provider, AgentConfig(stream=streaming))))

    assert (reward.score, reward.signal.total) == (0, 0)
    assert (profile.success_rate, profile.domains["code"].mean, profile.consecutive_losses) == (0, 0, 1)


async def test_a_streamed_run_costs_the_same_as_a_whole_one(server: OpenAIServer, provider: OpenAIProvider) -> None:
    server.answer = lambda _request: Reply(text="It is five.", usage=(1500, 500))
    streamed, whole = [await ended(Agent(provider, AgentConfig(stream=stream))) for stream in (True, False)]
    profile, rewards = learned(streamed, replace(whole, ad=replace(whole.ad, task_id="another")))

    assert [reward.tokens for reward in rewards] == [2000, 2000]
    assert [reward.signal.efficiency for reward in rewards] == [pytest.approx(0.8)] * 2
    assert profile.tokens == 4000


async def test_a_loss_is_counted_once_despite_repeated_delivery() -> None:
    def fails(_text: str) -> str:
        raise RuntimeError("no")

    task = await ended(FunctionAgent(fails))
    once, _ = learned(task)
    often, _ = learned(task, task, task)

    assert (once.consecutive_losses, once.total_tasks) == (1, 1)
    assert (often.consecutive_losses, often.total_tasks, often.domains) == (1, 1, once.domains)
