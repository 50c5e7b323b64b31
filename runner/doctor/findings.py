"""Findings of `loom doctor`."""

from typing import Literal

from loom.schemas.base import CheckedMessage

Mark = Literal["ok", "warn", "fail"]


class Finding(CheckedMessage, frozen=True, kw_only=True, omit_defaults=False):
    """One thing looked at."""

    mark: Mark
    about: str
    """What was looked at: `server`, `clock`, `phase match`, …"""
    says: str
    todo: str = ""
    """What to do about it; empty where there is nothing to do."""


def ok(about: str, says: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(mark="ok", about=about, says=says)


def warn(about: str, says: str, todo: str) -> Finding:
    """Return a finding that is worth a look."""
    return Finding(mark="warn", about=about, says=says, todo=todo)


def fail(about: str, says: str, todo: str) -> Finding:
    """Return a finding that stops work."""
    return Finding(mark="fail", about=about, says=says, todo=todo)
