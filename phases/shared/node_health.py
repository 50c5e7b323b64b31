"""The health of a node, and its best heir: rules shared by the phases, the commands and the public API. Pure."""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Literal

from loom.schemas.config import ClusterConfig

Health = Literal["healthy", "warning", "dying"]

Standing = Literal["new", "unproven", "healthy", "warning", "failing"]
"""The reputation of a node: no rewards, few rewards, healthy, first losses, or failing."""

HEALTH_WINDOW = 10
"""Number of rewards in a node's recent mean; a shorter history never makes a node fail by its mean."""
FEW = 3
"""Number of rewards from which a low mean is shown as failing."""
NEUTRAL = 0.5
"""Score of a domain without evidence."""


def is_failing(rewards: Sequence[float], losses: int, config: ClusterConfig) -> bool:
    """Return whether a node lost too often in a row, or has a low mean over its last ten rewards.

    Args:
        rewards: Oldest first, each 0 to 1; with fewer than ten, the mean does not count.
        losses: Number of consecutive failures.
        config: Supplies `consecutive_loss_limit` and `apoptosis_threshold`.
    """
    recent = rewards[-HEALTH_WINDOW:]
    poor = len(recent) == HEALTH_WINDOW and fsum(recent) / HEALTH_WINDOW < config.apoptosis_threshold
    return losses >= config.consecutive_loss_limit or poor


def health(rewards: Sequence[float], losses: int, config: ClusterConfig) -> Health:
    """Return the health of a node: dying when it is failing, warning from half of the loss limit, otherwise healthy.

    Args:
        rewards: Oldest first, each 0 to 1.
        losses: Number of consecutive failures.
        config: As for `is_failing`.
    """
    if is_failing(rewards, losses, config):
        return "dying"
    return "warning" if losses and losses >= config.consecutive_loss_limit / 2 else "healthy"


def standing(rewards: Sequence[float], losses: int, config: ClusterConfig) -> Standing:
    """Return the reputation of a node, which also rates a short history, unlike `health`.

    Three rewards with a low mean are shown to people as failing; only `health` and `is_failing` decide what happens to
    the node.

    Args:
        rewards: Oldest first, each 0 to 1.
        losses: Number of consecutive failures.
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
    """Return how well a node complements a retiring one as its heir: sum |Δscore| · (1 - load / 2).

    Args:
        mine: domain_token -> score of the retiring node.
        its: domain_token -> score of the heir.
        load: Load of the heir, 0 to 1.
    """
    apart = sum(abs(mine.get(domain_token, NEUTRAL) - its.get(domain_token, NEUTRAL)) for domain_token in {*mine, *its})
    return apart * (1 - 0.5 * load)
