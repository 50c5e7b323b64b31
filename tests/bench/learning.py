"""How soon the loop learns whom to trust, against other ways to award: `python tests/bench/learning.py`.

Eight agents, six domains, a specialist for each; two generalists; the rest poor. After a third of the tasks every
specialist silently drops, after two thirds a newcomer joins who is the best in the first domain. Outcomes are 0 or 1.
Awards are made by the code of MATCH and learned by the code of ADAPT, one task at a time, without a bus; with
`--bus` the same worlds are played over a real one, with the agents in processes of their own.

Regret is what the best agent would have earned more, on average, summed over all tasks: fewer is better.
"""

import argparse
import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Protocol

from loom.bus.host_directory import HostKey
from loom.phases.adapt.evidence import apply_reward
from loom.phases.match.award_policies import POLICIES, load_policy
from loom.phases.match.ranked_bids import award
from loom.phases.match.scoring import AuctionContext
from loom.schemas.auction import Bid
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.task import TaskAd

AGENTS, DOMAINS, TASKS = 8, 6, 3000
DROPS = (0.15, 0.45, 0.70)
NEWCOMER, ELSEWHERE = 0.97, 0.3
HOST = HostKey("local", "h")
CLAIM = 0.5
"""What every honest agent claims: nothing."""
DISHONEST = 0.2
"""How often the one who claims 1.0 succeeds."""
SEEDS = range(1000, 1020)
"""Reported; others were used to choose the numbers of the policy."""
RECOVERED = 0.10
"""Mean regret of a hundred tasks at which a drop has been got over."""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    drop: float = DROPS[0]
    flip: float = 0.0
    """Share of judgements that are wrong."""
    delay: int = 0
    """Tasks by which a reward is late."""
    tasks: int = TASKS
    dishonest: bool = False
    """Whether one of the generalists claims 1.0 and delivers .2."""

    @property
    def drop_at(self) -> int:
        return self.tasks // 3

    @property
    def join_at(self) -> int:
        return 2 * self.tasks // 3

    def __str__(self) -> str:
        more = f", {self.flip:.0%} flipped" if self.flip else f", {self.delay} late" if self.delay else ""
        return f"drop to {self.drop:.2f}{more}"


class World:
    """Who does what how well, and how each task would go: the same for one random seed, whatever policy plays."""

    def __init__(self, seed: int, setting: Setting) -> None:
        dice = Random(seed)
        self.seed, self.setting = seed, setting
        self._skills = [[dice.uniform(0.2, 0.6) for _ in range(DOMAINS)] for _ in range(AGENTS)]
        agents = dice.sample(range(AGENTS), AGENTS)
        self.specialists, generalists = agents[:DOMAINS], agents[DOMAINS:]
        for agent in generalists:
            self._skills[agent] = [dice.uniform(0.55, 0.65) for _ in range(DOMAINS)]
        for domain, agent in enumerate(self.specialists):
            self._skills[agent][domain] = dice.uniform(0.85, 0.95)
        self._skills.append([NEWCOMER] + [ELSEWHERE] * (DOMAINS - 1))
        self.boaster = generalists[0] if setting.dishonest else None
        if self.boaster is not None:
            self._skills[self.boaster] = [DISHONEST] * DOMAINS
        self._draws = [(dice.randrange(DOMAINS), dice.random(), dice.random()) for _ in range(setting.tasks)]

    def domain(self, number: int) -> int:
        return self._draws[number][0]

    def agents(self, number: int) -> int:
        """How many agents there are when a task comes."""
        return AGENTS + (number >= self.setting.join_at)

    def claim(self, agent: int) -> float:
        return 1.0 if agent == self.boaster else CLAIM

    def skill(self, number: int, agent: int, domain: int) -> float:
        """How often an agent succeeds in a domain when a task comes."""
        dropped = number >= self.setting.drop_at and agent < AGENTS and self.specialists[domain] == agent
        return self.setting.drop if dropped else self._skills[agent][domain]

    def score(self, number: int, agent: int) -> float:
        """The verdict of the judge on an agent's work on a task: 1 or 0, and sometimes the wrong one."""
        domain, luck, judgement = self._draws[number]
        return float((luck < self.skill(number, agent, domain)) != (judgement < self.setting.flip))

    def regret(self, number: int, agent: int) -> float:
        domain = self.domain(number)
        best = max(self.skill(number, each, domain) for each in range(self.agents(number)))
        return best - self.skill(number, agent, domain)


@dataclass(frozen=True)
class Figures:
    """What came out of one run."""

    regret: float
    optimal: float
    """Share of the tasks before the drop that went to the best agent."""
    recovered_after: int | None
    """Tasks after the drop until the mean regret of the last hundred is small."""
    newcomer_after: int | None
    """Tasks of its domain until the newcomer has had 16 of 20."""

    @classmethod
    def of(cls, world: World, winners: Sequence[int]) -> "Figures":
        """Return the figures of a run; `winners` are agents, by task."""
        drop_at, join_at = world.setting.drop_at, world.setting.join_at
        regrets = [world.regret(number, winner) for number, winner in enumerate(winners)]
        after = regrets[drop_at:]
        joined = [winners[number] == AGENTS for number in range(join_at, len(winners)) if world.domain(number) == 0]
        return cls(
            regret=sum(regrets),
            optimal=sum(regret == 0 for regret in regrets[:drop_at]) / drop_at,
            recovered_after=next(
                (n for n in range(100, len(after) + 1) if mean(after[n - 100 : n]) <= RECOVERED), None
            ),
            newcomer_after=next((n for n in range(1, len(joined) + 1) if sum(joined[max(0, n - 20) : n]) >= 16), None),
        )


class Player(Protocol):
    """One way to award tasks."""

    def choose(self, number: int) -> int:
        """Return the agent that gets a task."""
        ...

    def learn(self, number: int, agent: int, score: float) -> None:
        """Learn the result of a task."""
        ...


class Learner:
    """One of the loop's policies, with all that MATCH and ADAPT know; every agent is free."""

    def __init__(self, name: str, world: World) -> None:
        self._world = world
        self._policy = load_policy(name)
        self._forget = name == "glr_ucb"
        self._profiles: dict[str, NodeProfile] = {}
        self._pending: Counter[tuple[str, str]] = Counter()

    def choose(self, number: int) -> int:
        domain_token = f"d{self._world.domain(number)}"
        task = Envelope(
            ad=TaskAd(task_id=f"t{number}", domain=domain_token, description="x"),
            spec=Spec(complexity=0.3, domains=(domain_token,), method="given"),
            deadline=0,
        )
        agents = range(self._world.agents(number))
        bids = [(HOST, Bid(node_id=str(agent), self_rating=self._world.claim(agent))) for agent in agents]
        winner = award(task, bids, AuctionContext(self._profiles, self._policy, pending_awards=self._pending)).node_id
        self._pending[winner, domain_token] += 1
        return int(winner)

    def learn(self, number: int, agent: int, score: float) -> None:
        reward = Reward(
            reward_id=f"t{number}:1:rules",
            task_id=f"t{number}",
            attempt=1,
            node_id=str(agent),
            domain_token=f"d{self._world.domain(number)}",
            score=score,
            ended_at=number,
        )
        known = self._profiles.get(reward.node_id, NodeProfile(node_id=reward.node_id))
        self._profiles[reward.node_id] = apply_reward(known, reward, number + 1, forget=self._forget)
        self._pending[reward.node_id, reward.domain_token] -= 1


class StaticClaims:
    """Believes the claims of all agents at their arrival, which were true."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._claims: list[list[float]] = []

    def choose(self, number: int) -> int:
        world, domain = self._world, self._world.domain(number)
        for agent in range(len(self._claims), world.agents(number)):
            self._claims.append([world.skill(number, agent, each) for each in range(DOMAINS)])
        return max(range(len(self._claims)), key=lambda agent: self._claims[agent][domain])

    def learn(self, number: int, agent: int, score: float) -> None:
        """Learn nothing."""


class LegacyFormula:
    """Loom-agent 0.6: .4 capability + .2 success rate, moving averages (.3) of its reward; it never explores.

    It learns the result of every task, of which its reward makes .85 for a success and .3 for a failure.

    Args:
        knowing: Whether capabilities begin as what they truly are, which no other policy knows; else as .5.
    """

    ALPHA, WON, LOST = 0.3, 0.85, 0.3

    def __init__(self, world: World, *, knowing: bool = False) -> None:
        self._world, self._knowing = world, knowing
        self._scores: list[list[float]] = []
        self._rates: list[float] = []

    def choose(self, number: int) -> int:
        world, domain = self._world, self._world.domain(number)
        for agent in range(len(self._scores), world.agents(number)):
            known = [world.skill(number, agent, each) for each in range(DOMAINS)]
            self._scores.append(known if self._knowing else [CLAIM] * DOMAINS)
            self._rates.append(0.0)
        return max(
            range(len(self._scores)), key=lambda agent: 0.4 * self._scores[agent][domain] + 0.2 * self._rates[agent]
        )

    def learn(self, number: int, agent: int, score: float) -> None:
        domain, reward = self._world.domain(number), self.WON if score > 0.5 else self.LOST
        self._scores[agent][domain] += self.ALPHA * (reward - self._scores[agent][domain])
        self._rates[agent] += self.ALPHA * ((reward > 0.5) - self._rates[agent])


def players() -> dict[str, Callable[[World], Player]]:
    own: dict[str, Callable[[World], Player]] = {name: partial(Learner, name) for name in POLICIES}
    knowing = partial(LegacyFormula, knowing=True)
    return {**own, "0.6 formula": LegacyFormula, "0.6, informed": knowing, "static claims": StaticClaims}


def play(name: str, world: World) -> list[int]:
    """Return whom a policy awards each task of a world to."""
    player, winners = players()[name](world), []
    for number in range(world.setting.tasks):
        winners.append(player.choose(number))
        late = number - world.setting.delay
        if late >= 0:
            player.learn(late, winners[late], world.score(late, winners[late]))
    return winners


def run(name: str, setting: Setting, seed: int) -> Figures:
    """Return what one policy does in one world."""
    world = World(seed, setting)
    return Figures.of(world, play(name, world))


def row(name: str, setting: Setting, runs: Sequence[Figures]) -> str:
    def typical(values: list[int | None]) -> str:
        return f"{median(math.inf if value is None else value for value in values):.0f}".replace("inf", "never")

    regrets = [each.regret for each in runs]
    spread = 1.96 * math.sqrt(sum((each - mean(regrets)) ** 2 for each in regrets) / max(1, len(regrets) - 1))
    return (
        f"{setting!s:26} {name:14} {mean(regrets):7.0f} ± {spread / math.sqrt(len(regrets)):3.0f}"
        f" {mean(each.optimal for each in runs):8.0%}"
        f" {typical([each.recovered_after for each in runs]):>8} {typical([each.newcomer_after for each in runs]):>8}"
    )


HEAD = f"{'':26} {'policy':14} {'regret':>13} {'optimal':>8} {'recover':>8} {'newcomer':>8}"


def table(names: list[str], settings: list[Setting], seeds: range) -> Iterator[str]:
    yield HEAD
    with ProcessPoolExecutor() as pool:
        jobs = {
            (setting, name): [pool.submit(run, name, setting, seed) for seed in seeds]
            for setting, name in product(settings, names)
        }
        for (setting, name), runs in jobs.items():
            yield row(name, setting, [each.result() for each in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=None, help="Which rows; all by default, over a bus glr_ucb.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Worlds for each row.")
    parser.add_argument("--tasks", type=int, default=TASKS, help="Tasks of each world.")
    parser.add_argument("--bus", action="store_true", help="Over a real bus, one task at a time and 16 at once.")
    given = parser.parse_args()
    drops = [Setting(drop, tasks=given.tasks) for drop in DROPS]
    worse = [Setting(flip=0.1, tasks=given.tasks), Setting(delay=16, tasks=given.tasks)]
    seeds = SEEDS[: given.seeds]
    if given.bus:
        sys.path.append(str(Path(__file__).parents[1]))
        from bench.over_bus import compare  # noqa: PLC0415 - needs tests/ on the path

        asyncio.run(compare(given.policies or ["glr_ucb"], drops, seeds))
        return
    for line in table(given.policies or list(players()), drops + worse, seeds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
