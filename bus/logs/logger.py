"""Loom's logger, which neither reads nor changes the global configuration of structlog and logging.

Unless a program selects another output (`use`), log events go to the standard library's logger `loom`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

_LIBRARY = logging.getLogger("loom")


def _as_text(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Render the name of the event, then its fields."""
    name = event.pop("event", "")
    facts = " ".join(f"{key}={value!r}" for key, value in event.items())
    return f"{name} {facts}".rstrip()


def _library_logger() -> Any:
    return structlog.wrap_logger(
        _LIBRARY,
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _as_text,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
    ).bind()


_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


def _ignore(_event: str, **_facts: Any) -> None:
    """Drop an event below the level of the program's logging."""


class _Log:
    """Passes each event to the current output."""

    def __init__(self) -> None:
        self.default = self.output = _library_logger()

    def __getattr__(self, name: str) -> Any:
        output = self.output
        if output is self.default and name in _LEVELS and not _LIBRARY.isEnabledFor(_LEVELS[name]):
            return _ignore
        return getattr(output, name)


_log = _Log()


def get_logger() -> FilteringBoundLogger:
    """Return loom's logger; its output may change at any time."""
    return cast("FilteringBoundLogger", _log)


def use(output: Any) -> None:
    """Send all further events to `output`, a bound logger."""
    _log.output = output


def reset() -> None:
    """Send all further events to the standard library's logger `loom` again."""
    use(_log.default)


def is_default() -> bool:
    """Return whether events go to the standard library's logger `loom`."""
    return _log.output is _log.default


@contextmanager
def replaced(output: Any) -> Iterator[None]:
    """Send events to `output`, a bound logger, while the block runs."""
    before = _log.output
    use(output)
    try:
        yield
    finally:
        use(before)
