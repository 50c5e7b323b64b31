from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.phases.adapt.calibration_writer import MAX_DOMAINS, CalibrationWriter, actual_complexity, recalibrated
from loom.phases.evaluate.rewards import reward_for
from loom.phases.sense.calibration_reader import calibrated
from loom.schemas.auction import Award
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.learning.calibration import Calibration
from loom.schemas.learning.reward import Reward
from loom.schemas.task import RunResult, TaskAd, TaskError

NEW = Calibration(domain_token="code")


def reward(estimated: float | None = 0.9, tokens: int = 4096, seconds: float = 15.0, **facts: Any) -> Reward:
    wanted: dict[str, Any] = {"score": 1.0, "reward_id": "t:1:rules", "domain_token": "code", **facts}
    return Reward(
        task_id="t", attempt=1, node_id="n", tokens=tokens, seconds=seconds, estimated=estimated,
        ended_at=1.0, **wanted,
    )  # fmt: skip


def guess(complexity: float = 0.5, domain: str = "code", note: str = "") -> Spec:
    return Spec(complexity=complexity, domains=(domain,), method="heuristic", note=note)


@pytest.mark.parametrize(
    ("tokens", "seconds", "hard"), [(0, 0, 0), (8192, 0, 0.6), (0, 30, 0.4), (4096, 15, 0.5), (99_999, 999, 1)]
)
def test_the_difficulty_of_a_task_is_measured_by_tokens_and_seconds(tokens: int, seconds: float, hard: float) -> None:
    assert actual_complexity(reward(tokens=tokens, seconds=seconds)) == pytest.approx(hard)


def test_the_bias_moves_three_tenths_of_the_way_with_each_task() -> None:
    once = recalibrated(NEW, reward(), 1)
    assert once.bias == pytest.approx(-0.12)
    assert replace(once, bias=0) == Calibration(domain_token="code", count=1, last_seq=1)
    assert recalibrated(once, reward(), 2).bias == pytest.approx(-0.12 * 0.7 - 0.12)


@pytest.mark.parametrize(
    "nothing",
    [
        reward(estimated=None),
        reward(score=0.0),
        reward(source="person"),
        reward(kind="inherit"),
    ],
)
def test_only_a_rules_reward_of_a_guessed_success_recalibrates(nothing: Reward) -> None:
    assert recalibrated(NEW, nothing, 1) is NEW


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20_000), st.floats(0, 60)), max_size=20), st.integers(0, 20))
def test_folding_again_from_any_point_gives_the_same(tasks: list[tuple[float, int, float]], cut: int) -> None:
    def folded(known: Calibration, until: int) -> Calibration:
        for seq, (estimated, tokens, seconds) in enumerate(tasks[:until], start=1):
            known = recalibrated(known, reward(estimated, tokens, seconds), seq)
        return known

    assert folded(folded(NEW, cut), len(tasks)) == folded(NEW, len(tasks))


@given(st.floats(0, 1), st.floats(-1, 1), st.integers(0, 10))
def test_a_guess_is_corrected_within_bounds_from_three_tasks_on(complexity: float, bias: float, count: int) -> None:
    spec = calibrated(guess(complexity), {"code": Calibration(domain_token="code", bias=bias, count=count)})
    assert spec.estimated == complexity
    if count < 3:
        assert (spec.complexity, spec.note) == (complexity, "")
    else:
        assert spec.complexity == pytest.approx(min(1.0, max(0.0, complexity + bias)), abs=1e-4)


def test_a_correction_is_noted_after_earlier_notes() -> None:
    spec = calibrated(guess(0.5, note="the model could not be asked"), {"code": replace(NEW, bias=-0.2, count=7)})
    assert spec.note == "the model could not be asked; complexity 0.50 by itself, -0.20 by 7 tasks before"


def test_a_bias_is_read_under_the_key_it_is_written_under() -> None:
    known = Calibration(
        domain_token=Spec(complexity=0, domains=("代码",), method="given").domain_token, bias=-0.2, count=3
    )
    assert calibrated(guess(0.5, "代码"), {known.domain_token: known}).complexity == 0.3
    assert calibrated(guess(0.5, "数据"), {known.domain_token: known}).complexity == 0.5


def ended(**facts: Any) -> Envelope:
    return Envelope(
        ad=TaskAd(task_id="t", description="x"), deadline=1.0, award=Award(node_id="n", host_id="h"),
        result=RunResult(content="done"), **{"spec": replace(guess(0.3), estimated=0.4), **facts},
    )  # fmt: skip


def test_a_reward_has_the_guess_of_a_task_done_whole_by_its_node() -> None:
    guesses = [
        reward_for(ended(), None, 1.0),
        reward_for(ended(spec=guess()), None, 1.0),
        reward_for(ended(inputs={"part": "done by others"}), None, 1.0),
        reward_for(ended(), TaskError(code="agent_failed", message=""), 1.0),
    ]
    assert [one and one.estimated for one in guesses] == [0.4, None, None, None]


def test_the_number_of_calibrated_domains_is_bounded_and_known_ones_continue() -> None:
    calibrating = CalibrationWriter(Bus("nats://nowhere"))
    domain_tokens = [f"d{number}" for number in range(MAX_DOMAINS + 1)]

    assert [
        calibrating.apply(seq, reward(domain_token=domain_token)) for seq, domain_token in enumerate(domain_tokens, 1)
    ] == [True] * MAX_DOMAINS + [False]
    assert calibrating.apply(MAX_DOMAINS + 2, reward(domain_token=domain_tokens[0]))
    assert not calibrating.apply(MAX_DOMAINS + 3, reward(domain_token=domain_tokens[-1]))
