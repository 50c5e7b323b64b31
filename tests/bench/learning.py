"""How soon the loop learns whom to trust, against other ways to award: `python tests/bench/learning.py`.

Eight agents, six domains, a specialist for each; two generalists; the rest poor. After a third of the tasks every
specialist silently drops, after two thirds a newcomer joins who is the best in the first domain. Outcomes are 0 or 1.
Awards are made by the code of MATCH and learned by the code of ADAPT, one task at a time, without a bus.

Regret is what the best agent would have earned more, on average, summed over all tasks: fewer is better.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from random import Random
from statistics import mean, median

from loom.phases.adapt.fold import fold
from loom.phases.match.policy import Book, award
from loom.phases.match.trust import POLICIES, policy
from loom.schemas.auction import Bid
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.learning import NodeProfile, Reward
from loom.schemas.task import TaskAd

AGENTS, DOMAINS, TASKS = 8, 6, 3000
DROP_AT, JOIN_AT = 1000, 2000
DROPS = (0.15, 0.45, 0.70)
NEWCOMER, ELSEWHERE = 0.97, 0.3
CLAIM = 0.5
"""What every agent claims: nothing."""
SEEDS = range(1000, 1020)
"""Reported; others were used to choose the numbers of the policy."""
RECOVERED = 0.10
"""Mean regret of a hundred tasks at which a drop has been got over."""

World = list[list[float]]
"""agent -> domain -> how often it succeeds."""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    drop: float
    flip: float = 0.0
    """Share of judgements that are wrong."""
    delay: int = 0
    """Tasks by which a reward is late."""

    def __str__(self) -> str:
        more = f", {self.flip:.0%} flipped" if self.flip else f", {self.delay} late" if self.delay else ""
        return f"drop to {self.drop:.2f}{more}"


@dataclass
class Figures:
    """What came out of one run."""

    regret: float = 0.0
    optimal: int = 0
    """Tasks before the drop that went to the best agent."""
    recovered_after: int | None = None
    newcomer_after: int | None = None
    """Tasks of its domain until the newcomer has had 16 of 20."""
    _recent: list[float] = field(default_factory=list)
    _newcomers: list[bool] = field(default_factory=list)

    def note(self, number: int, regret: float, *, joined: bool | None) -> None:
        self.regret += regret
        self.optimal += number < DROP_AT and regret == 0
        if number >= DROP_AT and self.recovered_after is None:
            self._recent.append(regret)
            if len(self._recent) >= 100 and mean(self._recent[-100:]) <= RECOVERED:
                self.recovered_after = len(self._recent)
        if joined is not None and self.newcomer_after is None:
            self._newcomers.append(joined)
            if sum(self._newcomers[-20:]) >= 16:
                self.newcomer_after = len(self._newcomers)


def world(dice: Random) -> tuple[World, list[int]]:
    """Return who does what how well, and the specialist of each domain."""
    skills = [[dice.uniform(0.2, 0.6) for _ in range(DOMAINS)] for _ in range(AGENTS)]
    agents = dice.sample(range(AGENTS), AGENTS)
    specialists, generalists = agents[:DOMAINS], agents[DOMAINS:]
    for agent in generalists:
        skills[agent] = [dice.uniform(0.55, 0.65) for _ in range(DOMAINS)]
    for domain, agent in enumerate(specialists):
        skills[agent][domain] = dice.uniform(0.85, 0.95)
    return skills, specialists


class Learner:
    """One of the loop's policies, with all that MATCH and ADAPT know."""

    def __init__(self, name: str, _skills: World) -> None:
        self._policy = policy(name)
        self._forget = name == "glr_ucb"
        self._profiles: dict[str, NodeProfile] = {}

    def choose(self, number: int, domain: int, agents: int) -> int:
        slug = f"d{domain}"
        task = Envelope(
            ad=TaskAd(task_id=f"t{number}", domain=slug, description="x"),
            spec=Spec(complexity=0.3, domains=(slug,), method="given"),
            deadline=0,
        )
        bids = [("h", Bid(node_id=str(agent), claim=CLAIM)) for agent in range(agents)]
        return int(award(task, bids, Book(self._profiles, self._policy)).node_id)

    def learn(self, number: int, domain: int, agent: int, score: float) -> None:
        reward = Reward(
            reward_id=f"t{number}:1:rules",
            task_id=f"t{number}",
            attempt=1,
            node_id=str(agent),
            slug=f"d{domain}",
            score=score,
            ended_at=number,
        )
        known = self._profiles.get(reward.node_id, NodeProfile(node_id=reward.node_id))
        self._profiles[reward.node_id] = fold(known, reward, number + 1, forget=self._forget)


class StaticClaims:
    """Believes what it was told at the start, which was the truth."""

    def __init__(self, skills: World) -> None:
        self._told = [list(row) for row in skills]

    def choose(self, _number: int, domain: int, agents: int) -> int:
        return max(range(agents), key=lambda agent: self._told[agent][domain] if agent < len(self._told) else CLAIM)

    def learn(self, number: int, domain: int, agent: int, score: float) -> None:
        """Learn nothing."""


class SeedFormula:
    """.4 capability + .2 success rate, both moving averages (.3), told the truth at the start; never explores."""

    def __init__(self, skills: World) -> None:
        self._scores = [list(row) for row in skills]
        self._rates = [0.0] * AGENTS

    def choose(self, _number: int, domain: int, agents: int) -> int:
        while len(self._scores) < agents:
            self._scores.append([CLAIM] * DOMAINS)
            self._rates.append(0.0)
        return max(range(agents), key=lambda agent: 0.4 * self._scores[agent][domain] + 0.2 * self._rates[agent])

    def learn(self, _number: int, domain: int, agent: int, score: float) -> None:
        self._scores[agent][domain] += 0.3 * (score - self._scores[agent][domain])
        self._rates[agent] += 0.3 * ((score > 0.5) - self._rates[agent])


def learners() -> dict[str, Callable[[World], Learner | StaticClaims | SeedFormula]]:
    own = {name: partial(Learner, name) for name in POLICIES}
    return {**own, "static claims": StaticClaims, "seed formula": SeedFormula}


def run(name: str, setting: Setting, seed: int) -> Figures:
    """Return what one policy does in one world."""
    dice = Random(seed)
    skills, specialists = world(dice)
    learner, figures = learners()[name](skills), Figures()
    late: list[tuple[int, int, int, float]] = []
    for number in range(TASKS):
        if number == DROP_AT:
            for domain, agent in enumerate(specialists):
                skills[agent][domain] = setting.drop
        if number == JOIN_AT:
            skills.append([NEWCOMER] + [ELSEWHERE] * (DOMAINS - 1))
        domain = dice.randrange(DOMAINS)
        chosen = learner.choose(number, domain, len(skills))
        best = max(row[domain] for row in skills)
        joined = chosen == AGENTS if number >= JOIN_AT and domain == 0 else None
        figures.note(number, best - skills[chosen][domain], joined=joined)
        score = float(dice.random() < skills[chosen][domain])
        if dice.random() < setting.flip:
            score = 1 - score
        late.append((number, domain, chosen, score))
        if len(late) > setting.delay:
            learner.learn(*late.pop(0))
    return figures


def row(name: str, setting: Setting, runs: list[Figures]) -> str:
    def typical(values: list[int | None]) -> str:
        return f"{median(math.inf if value is None else value for value in values):.0f}".replace("inf", "never")

    regrets = [each.regret for each in runs]
    spread = 1.96 * math.sqrt(sum((each - mean(regrets)) ** 2 for each in regrets)) / max(1, len(regrets) - 1)
    return (
        f"{setting!s:26} {name:14} {mean(regrets):7.0f} ± {spread:3.0f}"
        f" {mean(each.optimal for each in runs) / DROP_AT:8.0%}"
        f" {typical([each.recovered_after for each in runs]):>8} {typical([each.newcomer_after for each in runs]):>8}"
    )


def table(names: list[str], settings: list[Setting], seeds: range) -> Iterator[str]:
    yield f"{'':26} {'policy':14} {'regret':>13} {'optimal':>8} {'recover':>8} {'newcomer':>8}"
    with ProcessPoolExecutor() as pool:
        jobs = {
            (setting, name): [pool.submit(run, name, setting, seed) for seed in seeds]
            for setting, name in product(settings, names)
        }
        for (setting, name), runs in jobs.items():
            yield row(name, setting, [each.result() for each in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=list(learners()), help="Which rows; all by default.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Worlds for each row.")
    given = parser.parse_args()
    settings = [Setting(drop) for drop in DROPS] + [Setting(DROPS[0], flip=0.1), Setting(DROPS[0], delay=16)]
    for line in table(given.policies, settings, SEEDS[: given.seeds]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
