"""What loom logs, for tests to look at: loom's own logger, so that structlog's `capture_logs` sees nothing of it."""

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

from loom.bus.logs import logger


def output(processors: Sequence[structlog.typing.Processor]) -> Any:
    """An output for every level whose last processor keeps or sends the line and raises DropEvent."""
    wrapper = structlog.make_filtering_bound_logger(logging.NOTSET)
    return structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=processors, wrapper_class=wrapper).bind()


@contextmanager
def capture_logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Yield a list that gets the facts of every line, while the body runs; nothing is printed."""
    capture = structlog.testing.LogCapture()
    with logger.replaced(output([capture])):
        yield capture.entries
