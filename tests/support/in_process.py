"""A command run in this process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from loom.runner import log_output
from loom.runner.cli.app import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Loom = Callable[..., Ended]


@contextmanager
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Loom]:
    """Yield a function that runs a command line in the environment of the test."""

    def run(line: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["loom", *line.split()])
        log_output.configure("error")  # the cluster is in this process too
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    yield run
    log_output.reset()


def is_refused(loom: Loom, line: str, code: int, message: str) -> None:
    """Check that the command ends with this code and prints one error line that begins with `message`."""
    ended = loom(line)

    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.err.startswith(message), ended
    assert ended.err.count("\n") == 1, ended
