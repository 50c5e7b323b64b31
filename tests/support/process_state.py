"""The state of the test process that outlives a test: recorded before it, restored after it."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from loom.runner import log_output
from loom.runner.cli import process_exit

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD)
POLICY_DEPRECATED = (3, 14)


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Run the body with logging at its defaults, and undo what it leaves in the process.

    pytest resets warning filters itself, and pytest-randomly the state of `random`.
    """
    environment, folder, path = dict(os.environ), os.getcwd(), [*sys.path]  # noqa: PTH109 - os.chdir wants the text
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _logging_restored(), _loop_policy_restored():
        _reset_structlog()
        try:
            yield
        finally:
            _reset_structlog()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
            os.chdir(folder)
            sys.path[:] = path
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)


def _reset_structlog() -> None:
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    log_output.reset()
    process_exit._left.clear()  # a command that runs in the test process would end that process


@contextmanager
def _logging_restored() -> Iterator[None]:
    """Restore level, handlers and switches of every logger there is, and of `loom`, even if no module has one yet."""
    logging.getLogger("loom")
    named = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    before = [(each, each.level, each.propagate, each.disabled, [*each.handlers]) for each in (logging.root, *named)]
    disabled = logging.root.manager.disable
    try:
        yield
    finally:
        logging.disable(disabled)
        for logger, level, propagate, off, handlers in before:
            if logger.level != level:
                logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, off
            if logger.handlers != handlers:
                logger.handlers[:] = handlers


@contextmanager
def _loop_policy_restored() -> Iterator[None]:
    if sys.version_info >= POLICY_DEPRECATED:  # a policy cannot be set there without a warning, which is an error
        yield
        return
    before = asyncio.get_event_loop_policy()
    try:
        yield
    finally:
        if asyncio.get_event_loop_policy() is not before:
            asyncio.set_event_loop_policy(before)
