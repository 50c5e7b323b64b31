"""Logs: readable on a terminal, JSON otherwise, always on standard error."""

import logging
import os
import sys

import structlog


def configure(level: str = "", *, readable: bool | None = None) -> None:
    """Set up structlog for this process; an empty level is `info`.

    Args:
        readable: Whether they end on a terminal; absent: whether standard error is one.
    """
    if readable is None:
        readable = sys.stderr.isatty()
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
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, (level or "info").upper())),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # the stream of the moment
    )
