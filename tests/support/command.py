"""`loom` as a process of its own, and the processes under it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

from support.wait import until

WITHIN_S = 30
LOOM = (sys.executable, "-m", "loom.runner.cli")
FOREIGN = ("LOOM_", "NATS_", "OPENAI_")
"""Settings of the machine the tests run on."""
_numbers = count()


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """A running command, its standard output and error in files."""

    def __init__(self, process: asyncio.subprocess.Process, out: Path, err: Path) -> None:
        self.process = process
        self._out, self._err = out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    async def wait_for_output(self, text: str) -> Self:
        """Wait for `text` on either output."""

        def printed() -> bool:
            is_printed = text in self.out + self.err
            assert is_printed or self.process.returncode is None, f"ended without {text!r}: {self.err}"
            return is_printed

        await until(printed, within_s=WITHIN_S, what=f"{text!r} is printed")
        return self

    async def end(self, number: signal.Signals | None = None) -> Ended:
        if number is not None:
            self.process.send_signal(number)
        async with asyncio.timeout(WITHIN_S):
            code = await self.process.wait()
        return Ended(code, self.out, self.err)


@asynccontextmanager
async def command(folder: Path, *words: str, **env: str) -> AsyncIterator[Command]:
    """Run `words` for the length of the block; what is left of it then is killed."""
    number = next(_numbers)
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own["XDG_DATA_HOME"] = str(folder / "data")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.PIPE, stdout=stdout, stderr=stderr, env={**own, **env}
        )
    try:
        yield Command(process, out, err)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def loom(folder: Path, *words: str, **env: str) -> Ended:
    """Run `loom` to its end."""
    async with command(folder, *LOOM, *words, **env) as running:
        return await running.end()


def below(pid: int) -> dict[int, str]:
    """Process id -> command line of everything that process has started, and what those have."""
    rows = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    parents, words = {}, {}
    for row in rows.splitlines():
        own, parent, args = row.split(maxsplit=2)
        parents[int(own)], words[int(own)] = int(parent), args
    found: dict[int, str] = {}
    newest = {pid}
    while newest:
        newest = {own for own, parent in parents.items() if parent in newest}
        found |= {own: words[own] for own in newest}
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
