"""Completion of command lines by bash, with the script that `loom --install-completion` installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BIN = str(Path(sys.executable).parent)
COMPLETE = """
eval "$(_LOOM_COMPLETE=source_bash loom)"
COMP_WORDS=({words}) COMP_CWORD={position}
_loom_completion loom
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def bash(script: str) -> list[str]:
    """Return the lines that bash prints, with `loom` on its path."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("loom ''", {"up", "run", "submit", "task", "node", "host", "phase", "dead", "backup"}),
        ("loom ta", {"tap", "task"}),
        ("loom task ''", {"ls", "show", "cancel"}),
        ("loom submit --t", {"--task-id", "--timeout"}),
        ("loom host run --sl", {"--slots"}),
    ],
)
def test_bash_completes_commands_and_options(words: str, expected: set[str]) -> None:
    position = len(words.split()) - 1

    assert expected <= set(bash(COMPLETE.format(words=words, position=position)))


def test_bash_completes_file_names_where_a_command_takes_a_file() -> None:
    """Without words of loom, `-o default` makes bash complete file names."""
    assert bash(COMPLETE.format(words="loom host run ag", position=3)) == []
    assert bash('eval "$(_LOOM_COMPLETE=source_bash loom)"; complete -p loom')[:3] == ["complete", "-o", "default"]
