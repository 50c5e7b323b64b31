"""Files users hand to the command line: tasks as JSON lines, nodes as a Python file."""

import importlib.util
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from loom.agents.function_agent import as_agent
from loom.agents.host.slots import Node
from loom.agents.lifetime import CLOSE_S, has_lifetime
from loom.agents.self_ratings import domains_fault, scores_fault
from loom.agents.user_code import error_text
from loom.runner.cli.file_lifespan import LEAVE_S, InvalidLifespan, Lifespan, lifespan_of
from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import InvalidTask, LoomError
from loom.schemas.task import TaskAd
from loom.schemas.tokens import is_token

MODULE = "loom_nodes_file"
NODE_PARTS = ("id", "capabilities", "agent", "to_bid", "mirror")


class InvalidFile(LoomError):
    """A file cannot be read, written or used; the message names it and, where there is one, the line."""

    code = "invalid_file"


class NodeFile(NamedTuple):
    """What a Python file of nodes defines."""

    path: Path
    nodes: list[Node]
    lifespan: Lifespan | None = None
    """Opened before the nodes announce themselves, closed after they have drained."""

    @property
    def close_s(self) -> float:
        """Most seconds its agents and its lifespan take to close."""
        agents_s = CLOSE_S if any(has_lifetime(node.agent) for node in self.nodes) else 0.0
        return agents_s + (LEAVE_S if self.lifespan else 0.0)


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        InvalidFile: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror}") from error


def load_tasks(path: Path) -> list[TaskAd]:
    """Return the ads of a file, one JSON object a line; empty lines are left out.

    Raises:
        InvalidFile: It cannot be read, or holds no task.
        InvalidTask: A line is not an ad, or repeats an id; the message names line and field.
    """
    raw = read_file(path)
    ads: dict[str, TaskAd] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            ad = parse_ad(line)
        except InvalidTask as error:
            where = f"{path}, line {number}" + (f", field {error.field}" if error.field else "")
            raise InvalidTask(f"{where}: {error.message}", field=error.field) from error
        if ad.task_id in ads:
            raise InvalidTask(
                f"{path}, line {number}, field task_id: {ad.task_id} is the task of line {lines[ad.task_id]}",
                field="task_id",
            )
        ads[ad.task_id], lines[ad.task_id] = ad, number
    if not ads:
        raise InvalidFile(f"{path}: holds no task")
    return list(ads.values())


def load_node_file(path: Path) -> NodeFile:
    """Return the list `nodes` a Python file defines, and its `lifespan`, if it has one.

    The file runs as a script would: it may import its neighbours, and whatever it raises is reported with its line.

    Raises:
        InvalidFile: It cannot be run, defines no `nodes`, one of them cannot be hosted, or its `lifespan` cannot be
            used.
    """
    module = _run(path)
    given = vars(module).get("lifespan")
    try:
        lifespan = None if given is None else lifespan_of(given)
    except InvalidLifespan as error:
        raise InvalidFile(f"{path}: {error.message}") from None
    return NodeFile(path, _nodes(path, vars(module).get("nodes")), lifespan)


def _nodes(path: Path, nodes: Any) -> list[Node]:
    if not isinstance(nodes, list) or not nodes:
        raise InvalidFile(f"{path}: defines no `nodes`; give it a list of AgentNode")
    seen: set[str] = set()
    for index, node in enumerate(nodes):
        try:
            fault = _fault(node, seen)
        except BaseException as error:  # noqa: BLE001 - a class of the file's may raise when it is looked at
            fault = f"cannot be looked at: {error_text(error)}"
        if fault:
            raise InvalidFile(f"{path}: nodes[{index}] {fault}")
    return nodes


def _run(path: Path) -> ModuleType:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        is_file = False
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror}") from error
    if not is_file:
        raise InvalidFile(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise InvalidFile(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses and pickles look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _interruptible() as interrupted:
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InvalidFile(f"{error.filename or path}, line {error.lineno}: {error.msg}") from error
    except BaseException as error:  # the file is user code: whatever it raises is its fault
        if interrupted:
            raise
        raise InvalidFile(f"{path}, line {_line_in(path, error)}: {error_text(error)}") from error
    return module


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield a list that holds SIGINT once Ctrl-C was pressed: the file may raise KeyboardInterrupt by itself."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _line_in(path: Path, error: BaseException) -> int | None:
    """The innermost line of the user's file that led to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return own[-1] if own else None


def _fault(node: Any, seen: set[str]) -> str | None:
    """Why `node` cannot be hosted, or None."""
    missing = [part for part in NODE_PARTS if not hasattr(node, part)]
    if missing:
        return f"is a {type(node).__name__} without `{missing[0]}`; make it an AgentNode"
    if not isinstance(node.id, str) or not is_token(node.id):
        return "has an id that does not match [A-Za-z0-9_-]{1,64}"
    if node.id in seen:
        return f"has the id of an earlier one, {node.id}"
    seen.add(node.id)
    if node.agent is None:
        return f"({node.id}) has no agent"
    try:
        as_agent(node.agent)
    except LoomError as error:
        return f"({node.id}): {error.message}"
    fault = domains_fault(getattr(node, "domains", None)) or scores_fault(getattr(node.capabilities, "scores", {}))
    return f"({node.id}) {fault}" if fault else None
