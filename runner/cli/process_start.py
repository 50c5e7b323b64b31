"""Start and end of a `loom` process, before and after the imports that take long.

As process 1 of a container, `loom` is the init as well. The kernel drops signals for which process 1 has no handler.
Process 1 becomes the parent of all orphans, which stay zombies until it waits for them.
"""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

LINGER_S = 1.0
"""Seconds that non-daemon threads may run after the command has ended."""
_OWN = {signal.SIGTTIN, signal.SIGTTOU, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
"""Signals that are not passed on: those of the terminal, and those of faults in this process."""
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def main() -> NoReturn:
    """Run the command of `sys.argv` and end the process with its exit code."""
    open_standard_streams()
    if os.getpid() == 1:
        fork_from_init()
    end(_run())


def _run() -> int:
    try:
        from loom.runner.cli.app import main as run_command  # noqa: PLC0415 - takes a while, and may be interrupted

        run_command()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)  # noqa: T201 - as the interpreter does
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def open_standard_streams() -> None:
    """Put /dev/null in the place of standard streams that are closed, as daemons and cron jobs leave them.

    The next file or socket would get the number of a closed stream, and printed text would be written into it.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def fork_from_init() -> None:
    """Go on in a child process; this one passes signals on to it, waits for orphans, and ends with the child's code."""
    every = signal.valid_signals() - _OWN
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        child = os.fork()
    except OSError:  # no room for another process: without an init, then
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    if child:
        os._exit(_init(child, every))
    _take_terminal()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_terminal() -> None:
    """Become a process group of its own, so that Ctrl-C comes once: from the terminal, and not passed on as well."""
    os.setpgid(0, 0)
    if os.isatty(0):
        ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with suppress(OSError):  # not this session's terminal
            os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, ignored)


def _init(child: int, every: set[signal.Signals]) -> int:
    """Return the exit code of the child, once it has ended."""
    while True:
        number = signal.sigwait(every)
        if number != signal.SIGCHLD:
            with suppress(ProcessLookupError):
                os.kill(child, number)
            continue
        code = _reap(child)
        if code is not None:
            return code


def _reap(child: int) -> int | None:
    """Wait for all that have ended; return the exit code of the child if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def end(code: int) -> NoReturn:
    """End the process, at the latest after LINGER_S, whatever threads still do: looking up a name takes up to 40 s."""
    try:
        deadline = time.monotonic() + LINGER_S
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(max(0.0, deadline - time.monotonic()))
        atexit._run_exitfuncs()  # noqa: SLF001 - before os._exit, which skips them
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError, KeyboardInterrupt):
        pass  # a broken pipe, a closed stream, a second Ctrl-C
    finally:
        os._exit(code)
