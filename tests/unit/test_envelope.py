"""The envelope: its hops, and the result of a task from its record."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom.schemas.auction import Award
from loom.schemas.base import MAX_MESSAGE_BYTES, decode, encode
from loom.schemas.envelope import MAX_HOPS, Claim, Envelope, Hop, Phase, RejectedResult, Spec, Split
from loom.schemas.record import TaskRecord
from loom.schemas.task import PhaseUsage, RunResult, TaskAd, TaskError, TaskResult, TaskUsage

PIPELINE: tuple[Phase, ...] = ("sense", "match", "scale", "execute", "evaluate")


def _envelope(**fields: Any) -> Envelope:
    return Envelope(ad=TaskAd(task_id="t1", description="count", **fields.pop("ad", {})), deadline=100.0, **fields)


def _hop(phase: Phase, instance: str = "a", at: float = 1.0, step: int = 0) -> Hop:
    return Hop(phase=phase, instance=instance, started=at, finished=at + 1, step=step)


def _path(env: Envelope) -> list[str]:
    return [hop.phase for hop in env.hops]


def test_a_hop_is_added_and_the_step_counted() -> None:
    env = _envelope(step=4).with_hop(_hop("match", step=4))
    assert env.hops == (_hop("match", step=4),)
    assert env.step == 5


def test_a_phase_that_sends_a_task_to_itself_extends_its_hop() -> None:
    env = _envelope()
    for n in range(50):
        env = env.with_hop(_hop("match", at=float(n), step=n))
    assert env.hops == (Hop(phase="match", instance="a", started=0.0, finished=50.0, step=49),)
    assert env.step == 50


def test_another_replica_of_the_phase_gets_a_hop_of_its_own() -> None:
    env = _envelope().with_hop(_hop("match", "a")).with_hop(_hop("match", "b")).with_hop(_hop("match", "a"))
    assert [hop.instance for hop in env.hops] == ["a", "b", "a"]


def test_a_phase_visited_again_after_others_gets_a_new_hop() -> None:
    env = _envelope()
    for phase in (*PIPELINE, "match", "match", "scale"):
        env = env.with_hop(_hop(phase))
    assert _path(env) == [*PIPELINE, "match", "scale"]
    assert env.step == 8


@settings(deadline=None)
@given(visits=st.lists(st.sampled_from(PIPELINE), max_size=300))
def test_hops_are_bounded_and_keep_both_ends(visits: list[Phase]) -> None:
    env, whole = _envelope(), list[int]()
    for n, phase in enumerate(visits):
        if not (n and visits[n - 1] == phase):
            whole.append(n)
        env = env.with_hop(_hop(phase, at=float(n), step=n))
    assert len(env.hops) <= MAX_HOPS
    assert env.step == len(visits)
    assert [hop.started for hop in env.hops[: MAX_HOPS // 2]] == whole[: MAX_HOPS // 2]
    assert [hop.started for hop in env.hops[MAX_HOPS // 2 :]] == whole[MAX_HOPS // 2 :][-MAX_HOPS // 2 :]


def test_an_envelope_with_everything_at_its_limit_still_fits_a_message() -> None:
    env = _envelope(
        ad={"context": {"a": "x" * 32_000}}, inputs={"a": "x" * 65_000}, result=RunResult(content="y" * 65_000)
    )
    for n in range(200):
        env = env.with_hop(_hop(PIPELINE[n % 5], instance="execute-0123abcd", at=1e9 + n / 3))
    assert len(encode(env)) < MAX_MESSAGE_BYTES


def test_a_failed_envelope_has_an_error_and_no_result() -> None:
    error = TaskError(code="node_lost", message="silent")
    env = _envelope(result=RunResult(content="half")).failed(error)
    assert (env.error, env.result) == (error, None)


def test_the_auctioned_domain_is_the_specs_first_then_the_ads_then_general() -> None:
    spec = Spec(complexity=0.5, domains=("数据", "code"), method="given")
    assert _envelope(spec=spec, ad={"domain": "text"}).domain == "数据"
    assert _envelope(spec=spec).domain_token == spec.domain_token
    assert _envelope(ad={"domain": "Text"}).domain_token == "text"
    assert _envelope().domain_token == "general"


def test_depth_is_none_for_a_submitted_task() -> None:
    assert _envelope().depth == 0
    assert _envelope(split=Split(parent="p", depth=2, deadline=9.0)).depth == 2


def _record(**fields: Any) -> TaskRecord:
    return TaskRecord(**{"task_id": "t1", "state": "running", "envelope": _envelope(), "admitted_at": 1.0, **fields})


@pytest.mark.parametrize(
    ("state", "ended"),
    [("accepted", False), ("running", False), ("succeeded", True), ("failed", True), ("cancelled", True)],
)
def test_a_record_knows_whether_the_task_has_ended(state: Any, ended: bool) -> None:
    assert _record(state=state).ended is ended


def test_a_success_names_the_node_that_was_awarded() -> None:
    run = RunResult(content="42", prompt_tokens=3, completion_tokens=4, steps=2, duration_s=1.5, truncated=True)
    env = _envelope(result=run, award=Award(node_id="n1", host_id="h1"), attempt=2)
    result = _record(state="succeeded", envelope=env, score=0.9, claim=Claim(attempt=2)).to_result()
    assert (result.content, result.truncated, result.steps, result.duration_s) == ("42", True, 2, 1.5)
    assert (result.prompt_tokens, result.completion_tokens) == (3, 4)
    assert (result.node_id, result.host_id, result.attempts, result.score) == ("n1", "h1", 2, 0.9)
    assert result.success
    assert result.error is None


def test_the_best_refused_result_names_its_node() -> None:
    run = RunResult(content="so so")
    env = _envelope(
        result=run,
        best_rejected=RejectedResult(result=run, score=0.4, node_id="n1", host_id="h1"),
        award=Award(node_id="n2", host_id="h2"),
        error=TaskError(code="rejected_result"),
    )
    result = _record(state="succeeded", envelope=env, below_threshold=True).to_result()
    assert (result.node_id, result.host_id, result.below_threshold) == ("n1", "h1", True)
    assert result.error is None


def test_a_failure_gives_its_reason() -> None:
    error = TaskError(code="no_bids", message="no bids")
    result = _record(state="failed", envelope=_envelope(error=error)).to_result()
    assert result.error == error
    assert not result.success
    assert result.node_id is None


def test_a_task_counts_the_attempts_that_were_claimed() -> None:
    assert _record(claim=Claim(attempt=0)).to_result().attempts == 0
    assert _record(claim=Claim(attempt=3)).to_result().attempts == 3
    assert _record(state="failed", envelope=_envelope(attempt=4), claim=Claim(attempt=3)).to_result().attempts == 3


def test_equal_results_have_equal_hashes_despite_different_phase_requests() -> None:
    usage = TaskUsage(phases={"sense": PhaseUsage(requests=1), "scale": PhaseUsage(requests=2)})
    result = TaskResult(task_id="t1", state="succeeded", usage=usage)
    assert {result, decode(encode(result), TaskResult)} == {result}
