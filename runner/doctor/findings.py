"""Findings of `loom doctor`."""

from typing import Literal

from loom.schemas.base import CheckedMessage

Mark = Literal["ok", "warn", "fail"]


class Finding(CheckedMessage, frozen=True, kw_only=True, omit_defaults=False):
    """The result of one check."""

    mark: Mark
    about: str
    """Subject of the check: `server`, `clock`, `phase match`, …"""
    message: str
    todo: str = ""
    """Steps that remove the fault; empty if none are needed."""


def ok(about: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(mark="ok", about=about, message=message)


def warn(about: str, message: str, todo: str) -> Finding:
    """Return a finding of something that works and needs attention."""
    return Finding(mark="warn", about=about, message=message, todo=todo)


def fail(about: str, message: str, todo: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(mark="fail", about=about, message=message, todo=todo)
