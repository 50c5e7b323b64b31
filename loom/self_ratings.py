"""A node's claims, as people give them."""

from collections.abc import Collection, Mapping
from copy import deepcopy

from loom.agents.self_ratings import domains_fault, scores_fault
from loom.compat.cluster_manager import InvalidNode
from loom.types import CapabilityProfile

AnyCapabilities = CapabilityProfile | Mapping[str, float]
"""A profile, or a mapping of domain -> rating."""


def profile_of(capabilities: AnyCapabilities | None, tools: Collection[str]) -> CapabilityProfile:
    """Return a profile of its own, with these tools besides.

    Raises:
        InvalidNode: A rating is not a number from 0 to 1, or a domain not a text.
    """
    given = CapabilityProfile() if capabilities is None else capabilities
    fault = scores_fault(given.scores if isinstance(given, CapabilityProfile) else given)
    if fault:
        raise InvalidNode(f"the node {fault}")
    # Copied, as two nodes may claim alike.
    profile = deepcopy(given) if isinstance(given, CapabilityProfile) else CapabilityProfile(scores=dict(given))
    profile.scores = {domain: float(rating) for domain, rating in profile.scores.items()}
    profile.tools = list(dict.fromkeys([*profile.tools, *tools]))
    return profile


def domains_of(domains: Collection[str] | None) -> list[str] | None:
    """Return the domains a node takes, a single text being one of them; None: every one.

    Raises:
        InvalidNode: There is not one, or one is not a text.
    """
    fault = domains_fault(domains)
    if fault:
        raise InvalidNode(f"the node {fault}")
    if domains is None:
        return None
    return [domains] if isinstance(domains, str) else list(domains)
