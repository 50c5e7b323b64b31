"""Errors: one code each, the same in every language."""

import pickle

import pytest

from loom.schemas import errors
from loom.schemas.base import decode, encode
from loom.schemas.errors import (
    BY_CODE,
    AgentFailed,
    BusUnavailable,
    InvalidTask,
    LoomError,
    NodeLost,
    TaskFailed,
    error_for,
)
from loom.schemas.task import BestRejected, TaskError

CODES = [
    *("invalid_task", "no_bids", "deadline_exceeded", "cancelled", "node_lost", "agent_failed", "rejected_result"),
    *("budget_exceeded", "invalid_plan", "overloaded", "unknown_task", "node_busy", "subtask_failed", "dead_letter"),
    "bus_unavailable",
]


def test_the_codes_are_the_published_ones() -> None:
    assert sorted(BY_CODE) == sorted(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_code_from_the_wire_becomes_its_error_and_back(code: str) -> None:
    error = error_for(code, "why", task_id="t1", node_id="n1")
    assert type(error) is BY_CODE[code]
    assert (error.code, error.message, str(error)) == (code, "why", "why")

    again = decode(encode(TaskError.of(error)), TaskError).to_exception("t1")
    assert type(again) is type(error)
    assert (again.message, again.task_id, again.node_id) == ("why", "t1", "n1")


def test_a_newer_peers_code_is_kept_unchanged() -> None:
    error = error_for("quota_exceeded", "why")
    assert type(error) is LoomError
    assert error.code == "quota_exceeded"
    assert LoomError.code == "unknown"


def test_every_error_of_the_module_has_its_own_code_and_is_in_the_table() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LoomError)]

    assert {cls for cls in classes if "code" in vars(cls)} - {LoomError} == set(BY_CODE.values())
    assert {cls.code: cls for cls in BY_CODE.values()} == BY_CODE


@pytest.mark.parametrize("error", [LoomError, InvalidTask, NodeLost])
def test_an_unknown_keyword_is_a_type_error(error: type[LoomError]) -> None:
    with pytest.raises(TypeError, match="retry_afer_s"):
        error("why", retry_afer_s=3)  # type: ignore[call-arg]


def test_only_the_error_of_a_task_has_its_best_answer() -> None:
    assert (AgentFailed("why", partial="half").partial, NodeLost("why").best_rejected) == ("half", None)
    with pytest.raises(TypeError, match="partial"):
        InvalidTask("why", partial="half")  # type: ignore[call-arg]


def test_an_error_keeps_its_attributes_when_pickled() -> None:
    error = pickle.loads(pickle.dumps(AgentFailed("why", task_id="t1", partial="half")))

    assert (str(error), error.task_id, error.partial) == ("why", "t1", "half")


def test_the_exception_has_the_best_refused_answer() -> None:
    best = BestRejected(content="It is Lyon.", node_id="n1")
    error = TaskError(code="deadline_exceeded", best_rejected=best).to_exception("t1")

    assert isinstance(error, TaskFailed)
    assert (error.best_rejected, error.partial) == (best, "It is Lyon.")


def test_facts_are_attributes_and_a_fact_an_error_lacks_is_none() -> None:
    error = NodeLost("why", node_id="n1")
    assert error.node_id == "n1"
    assert error.field is None
    assert BusUnavailable("why", url="nats://a").url == "nats://a"


def test_a_name_that_is_not_a_fact_is_not_an_attribute() -> None:
    with pytest.raises(AttributeError):
        InvalidTask("why").nonsense  # noqa: B018


def test_a_long_message_is_cut_to_the_limit_of_the_wire() -> None:
    error = TaskError.of(InvalidTask("x" * 5000, field="description"))
    assert decode(encode(error), TaskError) == error
    assert error.field == "description"


def test_the_node_to_blame_may_be_added() -> None:
    assert TaskError.of(LoomError("why"), node_id="n2").node_id == "n2"
    assert TaskError.of(NodeLost("why", node_id="n1"), node_id=None).node_id == "n1"
