"""What a node says of itself, as people give it."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from numbers import Real
from typing import Any

from loom.cluster.manager import InvalidNode
from loom.types import CapabilityProfile

AnyCapabilities = CapabilityProfile | Mapping[str, float]
"""A profile, or a mapping of domain -> rating."""


def profile_of(capabilities: AnyCapabilities | None, tools: Collection[str]) -> CapabilityProfile:
    """Return a profile of its own, with these tools besides.

    Raises:
        InvalidNode: A rating is not a number from 0 to 1, or a domain not a text.
    """
    if capabilities is None:
        profile = CapabilityProfile()
    elif isinstance(capabilities, CapabilityProfile):
        profile = deepcopy(capabilities)  # two nodes may claim alike
    elif isinstance(capabilities, Mapping):
        profile = CapabilityProfile(scores=dict(capabilities))
    else:
        kind = type(capabilities).__name__
        raise InvalidNode(f'capabilities are a {kind}: give a dict such as {{"code": 0.9}}, or a CapabilityProfile')
    profile.scores = {_domain(domain): _rating(domain, rating) for domain, rating in profile.scores.items()}
    profile.tools = list(dict.fromkeys([*profile.tools, *tools]))
    return profile


def domains_of(domains: Collection[str] | None) -> list[str] | None:
    """Return the domains a node takes, a single text being one of them; None: every one.

    Raises:
        InvalidNode: There is not one, or one is not a text.
    """
    if domains is None:
        return None
    given = [domains] if isinstance(domains, str) else list(domains)
    if not given:
        raise InvalidNode("domains is empty: name at least one, or leave it out for a node that takes every domain")
    return [_domain(domain) for domain in given]


def _domain(domain: Any) -> str:
    if not isinstance(domain, str) or not domain.strip():
        kind = "empty" if isinstance(domain, str) else f"a {type(domain).__name__}"
        raise InvalidNode(f"a domain is {kind}: give a text such as 'code'")
    return domain


def _rating(domain: str, rating: Any) -> float:
    if isinstance(rating, Real) and not isinstance(rating, bool):
        value = float(rating)
        if 0 <= value <= 1:
            return value
        shown = f"{value:g}"
    else:
        shown = f"a {type(rating).__name__}"
    raise InvalidNode(f"the rating in {domain!r} is {shown}: give a number from 0 (useless) to 1 (expert)")
