"""When a node is failing, and whose place it would best take: what the phases and the front door decide alike."""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Literal

from loom.schemas.config import ClusterConfig

Health = Literal["healthy", "warning", "dying"]

Standing = Literal["new", "unproven", "healthy", "warning", "failing"]
"""What is known of a node: nothing, too little, that it does well, that it has begun to fail, that it fails."""

HEALTH_WINDOW = 10
"""Rewards a node's recent mean is made of; with fewer, the mean says too little to condemn anybody."""
FEW = 3
"""Rewards from which a poor mean is worth a word."""
NEUTRAL = 0.5
"""The score of a domain nothing is known about."""


def is_failing(rewards: Sequence[float], losses: int, config: ClusterConfig) -> bool:
    """Return whether a node lost too often in a row, or earned too little over its last ten rewards.

    Args:
        rewards: Oldest first, each 0 to 1; fewer than ten condemn nobody.
        losses: Failures in a row.
        config: Its `consecutive_loss_limit` and `apoptosis_threshold`.
    """
    recent = rewards[-HEALTH_WINDOW:]
    poor = len(recent) == HEALTH_WINDOW and fsum(recent) / HEALTH_WINDOW < config.apoptosis_threshold
    return losses >= config.consecutive_loss_limit or poor


def health(rewards: Sequence[float], losses: int, config: ClusterConfig) -> Health:
    """Return how a node fares: dying when it is failing, a warning at half the losses; little history is healthy.

    Args:
        rewards: Oldest first, each 0 to 1.
        losses: Failures in a row.
        config: As for `is_failing`.
    """
    if is_failing(rewards, losses, config):
        return "dying"
    return "warning" if losses and losses >= config.consecutive_loss_limit / 2 else "healthy"


def standing(rewards: Sequence[float], losses: int, config: ClusterConfig) -> Standing:
    """Return what is known of a node, where `health` keeps silent about a short history.

    Three rewards that are poor on average are failing already, as far as people are concerned; only `health` and
    `is_failing` decide what happens to the node.

    Args:
        rewards: Oldest first, each 0 to 1.
        losses: Failures in a row.
        config: As for `is_failing`.
    """
    if not rewards:
        return "new"
    recent = rewards[-HEALTH_WINDOW:]
    poor = len(recent) >= FEW and fsum(recent) / len(recent) < config.apoptosis_threshold
    if poor or is_failing(rewards, losses, config):
        return "failing"
    if len(recent) < HEALTH_WINDOW:
        return "unproven"
    return "warning" if health(rewards, losses, config) == "warning" else "healthy"


def complement(mine: Mapping[str, float], its: Mapping[str, float], load: float) -> float:
    """Return how differently skilled a node is that might inherit: sum |Δscore| · (1 - load / 2).

    Args:
        mine: Domain's domain_token -> score, of who leaves.
        its: The same, of who stays.
        load: Of who stays, 0 to 1.
    """
    apart = sum(abs(mine.get(domain_token, NEUTRAL) - its.get(domain_token, NEUTRAL)) for domain_token in {*mine, *its})
    return apart * (1 - 0.5 * load)
