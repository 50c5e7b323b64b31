"""Loom's own logger: structlog's and logging's global configuration is neither read nor changed.

Unless a program asks otherwise (`use`), lines go to the standard library's logger `loom`, as those of any library do.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

_LIBRARY = logging.getLogger("loom")


def _is_wanted(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Drop a line that is below the level of the program's logging."""
    if not _LIBRARY.isEnabledFor(getattr(logging, method.upper())):
        raise structlog.DropEvent
    return event


def _as_text(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Render the event name, then its facts."""
    name = event.pop("event", "")
    facts = " ".join(f"{key}={value!r}" for key, value in event.items())
    return f"{name} {facts}".rstrip()


def _library_logger() -> Any:
    return structlog.wrap_logger(
        _LIBRARY,
        processors=[
            _is_wanted,
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _as_text,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
    ).bind()


class _Log:
    """Passes each line to the output of the moment."""

    def __init__(self) -> None:
        self.default = self.output = _library_logger()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output, name)


_log = _Log()


def get_logger() -> FilteringBoundLogger:
    """Return loom's logger; its output may change at any time."""
    return cast("FilteringBoundLogger", _log)


def use(output: Any) -> None:
    """Send every further line to `output`, a bound logger."""
    _log.output = output


def reset() -> None:
    """Send every further line to the standard library's logger `loom` again."""
    use(_log.default)


def is_default() -> bool:
    """Return whether lines go to the standard library's logger `loom`."""
    return _log.output is _log.default


@contextmanager
def replaced(output: Any) -> Iterator[None]:
    """Send lines to `output`, a bound logger, while the body runs."""
    before = _log.output
    use(output)
    try:
        yield
    finally:
        use(before)
