"""Leases, by which one replica acts for all."""

from loom.schemas.base import CheckedMessage, Name, Timestamp


class Lease(CheckedMessage, frozen=True, kw_only=True):
    """The replica that may act, and until when."""

    holder: Name
    until: Timestamp
    """Server time."""
