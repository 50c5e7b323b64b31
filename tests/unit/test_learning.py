"""Award policies and learning, simulated in small worlds without a bus."""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import mean, median

import pytest
from bench.learning import AGENTS, DROPS, SEEDS, Figures, Setting, World, play, run
from hypothesis import given
from hypothesis import strategies as st
from support.builders import ad, envelope

from loom.bus.host_directory import HostKey
from loom.phases.adapt.evidence import apply_reward
from loom.phases.match.ranked_bids import award
from loom.phases.match.scoring import AuctionContext
from loom.schemas.auction import Bid
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.learning.reward import Reward

OTHER_SEEDS = range(3000, 3020)
NEVER = 10**6
HOST = HostKey("local", "h")


def known(node_id: str, mean: float, count: int) -> NodeProfile:
    scores = (Score(attempt_id="r", score=mean, ended_at=0),)
    return NodeProfile(
        node_id=node_id, last_seq=1, domains={"code": DomainEvidence(scores=scores, count=count, mean=mean)}
    )


def awarded(tasks: int, bids: Mapping[str, Bid], works: Callable[[int, str], float]) -> list[str]:
    """Return the winner of each task in turn; all work is judged before the next task."""
    profiles: dict[str, NodeProfile] = {}
    winners = []
    for number in range(tasks):
        task = envelope(ad(task_id=f"t{number}"), now=0)
        winner = award(task, [(HOST, bid) for bid in bids.values()], AuctionContext(profiles)).node_id
        reward = Reward(
            reward_id=f"t{number}:1:rules",
            task_id=f"t{number}",
            attempt=1,
            node_id=winner,
            domain_token="code",
            score=works(number, winner),
            ended_at=number,
        )
        profiles[winner] = apply_reward(
            profiles.get(winner, NodeProfile(node_id=winner)), reward, number + 1, forget=True
        )
        winners.append(winner)
    return winners


# -- who cannot be believed, and who fails


def share_of_the_boaster(seed: int, tasks: int) -> float:
    world = World(seed, Setting(tasks=tasks, dishonest=True))
    last = play("glr_ucb", world)[-500:]
    return last.count(world.boaster or 0) / len(last)


@pytest.mark.slow
def test_a_dishonest_bidder_hardly_wins_once_it_is_known() -> None:
    shares = [share_of_the_boaster(seed, 1500) for seed in OTHER_SEEDS[:3]]

    assert max(shares) < 0.05


@pytest.mark.slow
def test_a_dishonest_bidder_hardly_wins_in_any_world() -> None:
    with ProcessPoolExecutor() as pool:
        shares = list(pool.map(partial(share_of_the_boaster, tasks=3000), OTHER_SEEDS))

    assert max(shares) < 0.05


def test_sixty_failures_in_a_row_do_not_all_go_to_one_node() -> None:
    bids = {"boaster": Bid(node_id="boaster", self_rating=1.0)} | {name: Bid(node_id=name) for name in "abcd"}
    had = Counter(awarded(60, bids, lambda _number, _winner: 0.0))

    assert set(had) == set(bids)
    assert max(had.values()) <= 20


def test_a_failing_node_loses_its_share_within_tens_of_tasks_despite_its_claims() -> None:
    bids = {"failing": Bid(node_id="failing", self_rating=1.0), "good": Bid(node_id="good", self_rating=0.5)}
    winners = awarded(100, bids, lambda _number, winner: float(winner == "good"))

    assert winners[:30].count("failing") <= 8
    assert winners[30:].count("failing") <= 2


def test_a_node_that_begins_to_fail_loses_its_share_within_tens_of_tasks() -> None:
    bids = {name: Bid(node_id=name) for name in ("turning", "steady")}
    winners = awarded(300, bids, lambda number, winner: float(number % 4 > 0 if winner == "steady" else number < 100))

    assert winners[60:100].count("turning") >= 30
    assert winners[120:].count("turning") <= 18


# -- load is weighed, and not decisive


@given(st.floats(0, 0.99), st.floats(0, 0.4), st.floats(0.5, 0.6), st.integers(20, 120))
def test_a_much_better_busy_node_with_room_beats_a_bad_idle_one(
    load: float, bad: float, better_by: float, count: int
) -> None:
    profiles = {"bad": known("bad", bad, count), "good": known("good", bad + better_by, count)}
    bids = [
        (HOST, Bid(node_id="bad", load=0.0)),
        (HOST, Bid(node_id="good", load=load, backlog=3, free=1)),
    ]

    assert award(envelope(ad(), now=0), bids, AuctionContext(profiles)).node_id == "good"


def test_the_idle_one_of_two_equal_nodes_wins() -> None:
    profiles = {name: known(name, 0.8, 40) for name in ("busy", "idle")}
    bids = [(HOST, Bid(node_id="busy", load=0.3)), (HOST, Bid(node_id="idle"))]

    assert award(envelope(ad(), now=0), bids, AuctionContext(profiles)).node_id == "idle"


def test_an_idle_novice_does_not_beat_a_better_busy_expert_on_claims_alone() -> None:
    bids = [
        (HOST, Bid(node_id="novice", self_rating=0.25)),
        (HOST, Bid(node_id="expert", self_rating=0.825, load=0.8, free=4)),
    ]

    assert award(envelope(ad(), now=0), bids, AuctionContext()).node_id == "expert"


def test_an_idle_novice_is_tried_a_few_times_and_then_leaves_the_work_to_a_better_busy_expert() -> None:
    skills = {"novice": 0.25, "expert": 0.825}
    bids = {
        "novice": Bid(node_id="novice", self_rating=0.25),
        "expert": Bid(node_id="expert", self_rating=0.825, load=0.6, free=8),
    }
    winners = awarded(300, bids, lambda number, winner: float((number * 0.618) % 1 < skills[winner]))

    assert 1 <= winners[:100].count("novice") <= 20
    assert winners[100:].count("novice") <= 14


# -- the benchmark's own figures


def test_a_world_is_the_same_for_the_same_random_seed_and_specialists_drop_silently() -> None:
    world, again = (World(7, Setting(drop=0.45, tasks=300)) for _ in range(2))
    specialist = world.specialists[2]

    assert [world.score(n, n % AGENTS) for n in range(300)] == [again.score(n, n % AGENTS) for n in range(300)]
    assert world.skill(99, specialist, 2) >= 0.85
    assert world.skill(100, specialist, 2) == 0.45
    assert (world.agents(199), world.agents(200)) == (AGENTS, AGENTS + 1)


def test_an_oracle_shows_no_regret() -> None:
    world = World(7, Setting(tasks=900))
    best = [min(range(world.agents(n)), key=lambda agent, n=n: world.regret(n, agent)) for n in range(900)]  # type: ignore[misc]
    figures = Figures.of(world, best)

    assert (figures.regret, figures.optimal, figures.recovered_after, figures.newcomer_after) == (0, 1, 100, 16)


@pytest.mark.slow
def test_learning_beats_guessing_and_round_robin_by_far() -> None:
    regrets = {
        name: mean(run(name, Setting(tasks=1500), seed).regret for seed in OTHER_SEEDS[:2])
        for name in ("glr_ucb", "random", "round_robin")
    }

    assert regrets["glr_ucb"] < 0.5 * min(regrets["random"], regrets["round_robin"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("setting", "most"),
    [*((Setting(drop), 225) for drop in DROPS), (Setting(flip=0.1), 270), (Setting(delay=16), 230)],
    ids=str,
)
def test_the_default_policy_keeps_its_figures(setting: Setting, most: float) -> None:
    with ProcessPoolExecutor() as pool:
        runs = list(pool.map(partial(run, "glr_ucb", setting), SEEDS))

    assert mean(each.regret for each in runs) <= most
    assert median(each.recovered_after or NEVER for each in runs) <= 350
    assert median(each.newcomer_after or NEVER for each in runs) <= 35
