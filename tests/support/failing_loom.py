"""`loom`, whose ADAPT fails at the first reward it reads and whose node host cannot send heartbeats."""

from typing import Any

from loom.agents.host import node_host
from loom.phases.adapt.service import Adapt
from loom.runner.cli.app import main


def _process(_self: Any, _message: Any) -> None:
    raise ValueError("a value that the code does not expect")


async def _repeat_every(_seconds: float, _act: Any) -> None:
    raise ValueError("a value that the code does not expect")


Adapt._process = _process  # type: ignore[method-assign]
node_host.repeat_every = _repeat_every

if __name__ == "__main__":
    main()
