"""Reads the files in `inputs`."""

from pathlib import Path

from loom.schemas.errors import AgentFailed

INPUTS = Path(__file__).resolve().parents[1] / "inputs"
MAX_BYTES = 2_000_000


def read_input(file: str) -> str:
    """Return the text of a file in `inputs`.

    Raises:
        AgentFailed: The file is outside that folder, does not exist, or is larger than 2 MB.
    """
    path = (INPUTS / file).resolve()
    if not path.is_relative_to(INPUTS):
        raise AgentFailed(f"{file} is outside the inputs folder")
    if not path.is_file():
        raise AgentFailed(f"there is no {file} in the inputs folder")
    if path.stat().st_size > MAX_BYTES:
        raise AgentFailed(f"{file} is larger than {MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")
