"""The error codes of a host that EXECUTE accepts, and the facts that confirm them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.phases.execute.host_errors import CLOCK_SKEW_S, USED_SHARE, RunFacts, confirmed_error
from loom.schemas.errors import BY_CODE
from loom.schemas.task import TaskError

NOTHING = RunFacts(budget=None, tokens=0, left_s=60, delegation_failed=False, cancelled=False)

facts = st.builds(
    RunFacts,
    budget=st.none() | st.integers(0, 100),
    tokens=st.integers(0, 200),
    left_s=st.floats(-5, 100),
    delegation_failed=st.booleans(),
    cancelled=st.booleans(),
)
codes = st.sampled_from(sorted(BY_CODE)) | st.text(max_size=64)


def code(claimed: str, known: RunFacts) -> str:
    return confirmed_error(TaskError(code=claimed, message="why"), known).code


@given(codes, facts)
def test_a_code_is_accepted_only_with_a_confirming_fact(claimed: str, known: RunFacts) -> None:
    found = code(claimed, known)
    assert found in (claimed, "agent_failed")
    if found == "budget_exceeded":
        assert known.budget is not None
        assert known.tokens >= USED_SHARE * known.budget
    elif found == "deadline_exceeded":
        assert known.left_s <= CLOCK_SKEW_S
    elif found == "subtask_failed":
        assert known.delegation_failed
    elif found == "cancelled":
        assert known.cancelled
    else:
        assert found in ("agent_failed", "node_busy", "invalid_task")


@pytest.mark.parametrize("claimed", sorted({*BY_CODE, "unheard_of"} - {"node_busy", "invalid_task"}))
def test_without_facts_every_code_is_the_agents_failure(claimed: str) -> None:
    assert code(claimed, NOTHING) == "agent_failed"


@pytest.mark.parametrize(
    ("claimed", "known"),
    [
        ("budget_exceeded", RunFacts(10, 10, 60, False, False)),
        ("deadline_exceeded", RunFacts(None, 0, CLOCK_SKEW_S, False, False)),
        ("subtask_failed", RunFacts(None, 0, 60, True, False)),
        ("cancelled", RunFacts(None, 0, 60, False, True)),
    ],
)
def test_a_confirmed_code_is_kept(claimed: str, known: RunFacts) -> None:
    assert code(claimed, known) == claimed


@pytest.mark.parametrize(
    ("claimed", "known"),
    [
        ("budget_exceeded", RunFacts(None, 10**6, 60, False, False)),
        ("budget_exceeded", RunFacts(10, 4, 60, False, False)),
        ("deadline_exceeded", RunFacts(None, 0, CLOCK_SKEW_S + 0.01, False, False)),
        ("subtask_failed", RunFacts(None, 0, 60, False, True)),
        ("cancelled", RunFacts(None, 0, 60, True, False)),
        ("no_bids", RunFacts(0, 10, -1, True, True)),
    ],
)
def test_another_fact_confirms_nothing(claimed: str, known: RunFacts) -> None:
    assert code(claimed, known) == "agent_failed"


def test_the_message_and_the_wait_are_kept_and_bounded() -> None:
    error = confirmed_error(TaskError(code="no_bids", message="x" * 5000, retry_after_s=3), NOTHING)
    assert (error.message, error.retry_after_s) == ("x" * 2000, 3)


def test_a_nodes_opinion_of_the_ad_keeps_its_code_and_its_field() -> None:
    error = TaskError(code="invalid_task", message="the file is not there", field="context", node_id="n1")
    assert confirmed_error(error, NOTHING) == error
