"""The award policies: each is a function from a bidder's statistics to its trust. Pure.

The random policies are derived from the task, so that a task awarded twice has the same winner.
"""

import importlib
import math
from collections.abc import Callable
from hashlib import blake2b
from random import Random

import msgspec

from loom.schemas.errors import LoomError

SELF_RATING_OBSERVATIONS = 2
"""Weight of a self-rating, in observed rewards."""


class BidderStats(msgspec.Struct, frozen=True, gc=False):
    """The statistics of one bidder at the award of a task."""

    task_id: str
    attempt: int
    node_id: str
    self_rating: float
    mean_reward: float
    """Mean of the node's rewards in the domain, 0 to 1; 0 without rewards.

    Newcomers of an owner other than `local` share one mean, reward count and pending count.
    """
    reward_count: float
    """Number of rewards behind the mean; old rewards count less than 1."""
    domain_reward_count: int
    """Number of rewards of all bidders in the domain."""
    pending_count: int = 0
    """Number of recent awards in the domain that have no reward yet."""
    exploration: float = 0.3
    """Factor c of the exploration bonus."""
    rng_key: str = ""
    """Key of the random generator: the qualified node, or the owner for newcomers that share; empty: `node_id`."""

    @property
    def blended_mean(self) -> float:
        """The mean reward, with the self-rating as a prior of two observations."""
        rewards = self.mean_reward * self.reward_count + self.self_rating * SELF_RATING_OBSERVATIONS
        return rewards / (self.reward_count + SELF_RATING_OBSERVATIONS)

    @property
    def rng(self) -> Random:
        """A random generator that is the same whenever the same attempt is awarded again."""
        key = f"{self.task_id}:{self.attempt}:{self.rng_key or self.node_id}"
        digest = blake2b(key.encode(), digest_size=8).digest()
        return Random(int.from_bytes(digest))  # noqa: S311 - repeatable on purpose


class Trust(msgspec.Struct, frozen=True, gc=False):
    """The trust of an award policy in one bidder."""

    value: float
    """A finite number from 0; the score of a bid counts it up to a limit."""
    bonus: float = 0.0
    """The part of the value that does not come from evidence."""


Policy = Callable[[BidderStats], Trust]


class UnknownAwardPolicy(LoomError):
    """The setting names an award policy that does not exist or cannot be imported."""

    code = "invalid_setting"


def ucb(stats: BidderStats) -> Trust:
    """Trust the mean plus a bonus for little evidence: c·sqrt(ln(N + 1) / (n + 2)), after UCB1 (Auer et al. 2002).

    Pending awards count in n: a node without evidence comes first, but gets only a few tasks at a time.
    """
    observations = stats.reward_count + stats.pending_count + SELF_RATING_OBSERVATIONS
    bonus = stats.exploration * math.sqrt(math.log(stats.domain_reward_count + 1) / observations)
    return Trust(stats.blended_mean + bonus, bonus)


def greedy(stats: BidderStats) -> Trust:
    """Trust the mean alone."""
    return Trust(stats.blended_mean)


def thompson(stats: BidderStats) -> Trust:
    """Trust a sample from the Beta distribution of the mean's true value (Thompson 1933)."""
    wins = stats.mean_reward * stats.reward_count + stats.self_rating * SELF_RATING_OBSERVATIONS
    losses = stats.reward_count + SELF_RATING_OBSERVATIONS - wins
    sample = stats.rng.betavariate(max(wins, 1e-3), max(losses, 1e-3))
    return Trust(sample, max(0.0, sample - stats.blended_mean))


def round_robin(stats: BidderStats) -> Trust:
    """Trust the bidder with the fewest tasks of the domain most."""
    return Trust(1 / (1 + stats.reward_count + stats.pending_count))


def random(stats: BidderStats) -> Trust:
    """Trust all bidders alike: the value is uniform between 0 and 1."""
    return Trust(stats.rng.random())


POLICIES: dict[str, Policy] = {
    "glr_ucb": ucb,  # ADAPT drops the evidence from before a change
    "ucb": ucb,
    "thompson": thompson,
    "greedy": greedy,
    "round_robin": round_robin,
    "random": random,
}

SAME_FOR_ALL_TASKS = frozenset({ucb, greedy, round_robin})
"""Policies whose trust in a node is the same for all tasks of a domain."""


def load_policy(name: str) -> Policy:
    """Return the award policy of that name, or the function that `module:function` names.

    Raises:
        UnknownAwardPolicy: There is no such policy, or it cannot be imported.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, _, function = name.partition(":")
    try:
        imported: Policy = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        names = ", ".join(POLICIES)
        why = f"there is no award policy {name!r}: use one of {names}, or module:function"
        raise UnknownAwardPolicy(why) from error
    return imported
