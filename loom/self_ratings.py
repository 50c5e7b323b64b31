"""Self-ratings and domains of a node, from the arguments of `add_agent`."""

from collections.abc import Collection, Mapping
from copy import deepcopy

from loom.agents.self_ratings import domains_fault, scores_fault
from loom.compat.cluster_manager import InvalidNode
from loom.nodes import CapabilityProfile

AnyCapabilities = CapabilityProfile | Mapping[str, float]
"""A profile, or a mapping of domain -> rating."""


def profile_of(capabilities: AnyCapabilities | None, tools: Collection[str]) -> CapabilityProfile:
    """Return a copy of the capabilities as a profile, with further tools.

    Raises:
        InvalidNode: A rating is not a number from 0 to 1, or a domain is not a string.
    """
    given = CapabilityProfile() if capabilities is None else capabilities
    fault = scores_fault(given.scores if isinstance(given, CapabilityProfile) else given)
    if fault:
        raise InvalidNode(f"the node {fault}")
    # A copy, because two nodes may share the argument.
    profile = deepcopy(given) if isinstance(given, CapabilityProfile) else CapabilityProfile(scores=dict(given))
    profile.scores = {domain: float(rating) for domain, rating in profile.scores.items()}
    profile.tools = list(dict.fromkeys([*profile.tools, *tools]))
    return profile


def domains_of(domains: Collection[str] | None) -> list[str] | None:
    """Return the domains that a node accepts; a string is a single domain, None means all.

    Raises:
        InvalidNode: The collection is empty, or a domain is not a string.
    """
    fault = domains_fault(domains)
    if fault:
        raise InvalidNode(f"the node {fault}")
    if domains is None:
        return None
    return [domains] if isinstance(domains, str) else list(domains)
