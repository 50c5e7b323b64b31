"""How far a bidder is trusted with a task: one function for each award policy. Pure, and the same for the same task."""

import importlib
import math
from collections.abc import Callable
from hashlib import blake2b
from random import Random

import msgspec

from loom.schemas.errors import LoomError

CLAIM_OBSERVATIONS = 2
"""Observations a claim counts as."""


class BidderStats(msgspec.Struct, frozen=True, gc=False):
    """What is known of one bidder when a task is awarded."""

    task_id: str
    attempt: int
    node_id: str
    claim: float
    mean: float
    """Of its rewards in the domain; 0 when there are none. Newcomers of an owner other than `local` have the mean,
    count and pending tasks of all of them."""
    count: float
    """Rewards behind the mean; old ones count less."""
    total: int
    """Rewards of all bidders in the domain."""
    pending: int = 0
    """Tasks of the domain it was awarded lately and has not been judged for."""
    exploration: float = 0.3
    """c of the bonus."""
    name: str = ""
    """What the randomness of its trust depends on: the node as people write it, or the owner whose newcomer it is."""

    @property
    def blended(self) -> float:
        """The mean reward, with the claim as a prior of two observations."""
        return (self.mean * self.count + self.claim * CLAIM_OBSERVATIONS) / (self.count + CLAIM_OBSERVATIONS)

    @property
    def rng(self) -> Random:
        """Randomness that is the same whenever the same task is awarded again."""
        digest = blake2b(f"{self.task_id}:{self.attempt}:{self.name or self.node_id}".encode(), digest_size=8).digest()
        return Random(int.from_bytes(digest))  # noqa: S311 - repeatable on purpose


class Trust(msgspec.Struct, frozen=True, gc=False):
    """What a policy says of a bidder."""

    value: float
    bonus: float = 0.0
    """The part of the value that is not evidence."""


Policy = Callable[[BidderStats], Trust]


class UnknownPolicy(LoomError):
    """The setting names no award policy."""

    code = "invalid_setting"


def ucb(known: BidderStats) -> Trust:
    """Trust the mean, plus a bonus for the little known: c·sqrt(ln(N + 1) / (n + 2)), after UCB1 (Auer et al. 2002).

    Tasks that are not judged yet count in n: so the unseen come first, but with a few tasks at a time.
    """
    seen = known.count + known.pending + CLAIM_OBSERVATIONS
    bonus = known.exploration * math.sqrt(math.log(known.total + 1) / seen)
    return Trust(known.blended + bonus, bonus)


def greedy(known: BidderStats) -> Trust:
    """Trust the mean alone."""
    return Trust(known.blended)


def thompson(known: BidderStats) -> Trust:
    """Trust a draw from the Beta distribution of what the mean may really be (Thompson 1933)."""
    wins = known.mean * known.count + known.claim * CLAIM_OBSERVATIONS
    losses = known.count + CLAIM_OBSERVATIONS - wins
    drawn = known.rng.betavariate(max(wins, 1e-3), max(losses, 1e-3))
    return Trust(drawn, max(0.0, drawn - known.blended))


def round_robin(known: BidderStats) -> Trust:
    """Trust whoever has had the fewest tasks of the domain."""
    return Trust(1 / (1 + known.count + known.pending))


def random(known: BidderStats) -> Trust:
    """Trust anybody alike."""
    return Trust(known.rng.random())


POLICIES: dict[str, Policy] = {
    "glr_ucb": ucb,  # with ADAPT forgetting what came before a change
    "ucb": ucb,
    "thompson": thompson,
    "greedy": greedy,
    "round_robin": round_robin,
    "random": random,
}


def policy(name: str) -> Policy:
    """Return the policy of that name, or the function `module:function` names.

    Raises:
        UnknownPolicy: There is no such policy, or it cannot be imported.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, _, function = name.partition(":")
    try:
        found: Policy = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(POLICIES)
        raise UnknownPolicy(f"there is no award policy {name!r}: use one of {known}, or module:function") from error
    return found
