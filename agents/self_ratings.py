"""Checks the self-ratings and the domains that users give for a node."""

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any


def scores_fault(scores: Any) -> str | None:
    """Return the fault of a node's self-ratings (domain -> 0 to 1), as a clause that follows its name, or None."""
    if not isinstance(scores, Mapping):
        return f'has capabilities that are a {type(scores).__name__}: give a dict such as {{"code": 0.9}}'
    faults = (_domain_fault(domain) or _rating_fault(domain, rating) for domain, rating in scores.items())
    return next((fault for fault in faults if fault), None)


def domains_fault(domains: Any) -> str | None:
    """Return the fault of a node's domains, as a clause that follows its name, or None; None means every domain."""
    if domains is None or (isinstance(domains, str) and domains.strip()):
        return None
    if isinstance(domains, str) or not isinstance(domains, Collection) or not domains:
        return "has no valid domains: give a list of texts, or leave it out for a node that accepts every domain"
    return next((fault for domain in domains if (fault := _domain_fault(domain))), None)


def _domain_fault(domain: Any) -> str | None:
    if isinstance(domain, str) and domain.strip():
        return None
    kind = "empty" if isinstance(domain, str) else f"a {type(domain).__name__}"
    return f"has a domain that is {kind}: give a text such as 'code'"


def _rating_fault(domain: str, rating: Any) -> str | None:
    if isinstance(rating, Real) and not isinstance(rating, bool):
        if 0 <= float(rating) <= 1:
            return None
        shown = f"{float(rating):g}"
    else:
        shown = f"a {type(rating).__name__}"
    return f"has the rating {shown} in {domain!r}: give a number from 0 (useless) to 1 (expert)"
