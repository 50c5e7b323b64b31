"""Loom's lines on standard error: readable on a terminal, JSON otherwise. No other logging is touched."""

import logging
import os
import sys

import structlog

from loom.bus.logs import logger


class _StandardError:
    """Writes lines to the standard error of the moment."""

    def msg(self, line: str) -> None:
        """Write one line."""
        if sys.stderr is not None:  # as under pythonw
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = msg


def configure(level: str = "", *, readable: bool | None = None) -> None:
    """Send loom's lines to standard error; an empty level is `info`.

    Args:
        readable: Whether they end on a terminal; absent: whether standard error is one.
    """
    if readable is None:
        readable = sys.stderr is not None and sys.stderr.isatty()
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if readable else "iso", utc=not readable),
    ]
    if readable:
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=not os.environ.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
            )
        )
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    wrapper = structlog.make_filtering_bound_logger(getattr(logging, (level or "info").upper()))
    logger.use(structlog.wrap_logger(_StandardError(), processors=processors, wrapper_class=wrapper).bind())


def reset() -> None:
    """Undo `configure`: loom's lines go to the standard library's logger `loom` again."""
    logger.reset()
