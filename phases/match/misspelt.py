"""A warning for a domain that looks misspelt. Pure."""

from collections.abc import Sequence

from loom.schemas.auction import Offer
from loom.schemas.envelope import Envelope
from loom.schemas.near import nearest_domain
from loom.schemas.task import domain_token

BEGINNING = "no node rates itself in "


def warning_for(envelope: Envelope, offers: Sequence[Offer]) -> str:
    """Return a sentence on the domain that the ad names, where a known one was probably meant; else an empty text.

    That is: none of the hosts has a node that names it, and one of them has a node that names a similar one. Nodes
    that name no domain at all are no reason for a warning. A task is warned of once.

    Args:
        offers: The answers to its call, of every host that should have answered.
    """
    domain = envelope.ad.domain.strip()
    hosts = [offer for offer in offers if offer.decline != "draining"]
    if not domain or not hosts or not all(offer.unrated for offer in hosts):
        return ""
    if warning_in(envelope) is not None:
        return ""
    near = nearest_domain(
        domain, (offer.near for offer in hosts if offer.near and domain_token(offer.near) != envelope.domain_token)
    )
    return f"{BEGINNING}{domain!r}; did you mean {near!r}?" if near else ""


def warning_in(envelope: Envelope) -> str | None:
    """Return the warning that a task has had already."""
    return next((warning for warning in envelope.warnings if warning.startswith(BEGINNING)), None)
