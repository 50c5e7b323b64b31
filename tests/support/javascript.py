"""A folder for programs in JavaScript, with the package they need."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.environments import OUTSIDE, locked, own_folder

PACKAGE = "@nats-io/transport-node"
MAJOR = 3


def javascript_folder() -> Path:
    """Return a folder in which npm has installed the package once for all workers; skip the test where it cannot."""
    npm, node_js = shutil.which("npm"), shutil.which("node")
    if npm is None or node_js is None:
        pytest.skip("node and npm are not on this machine")
    folder = own_folder() / "javascript"
    with locked(folder.with_suffix(".lock")):
        folder.mkdir(exist_ok=True)
        if not (folder / "node_modules" / PACKAGE).exists():
            words = (npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), f"{PACKAGE}@{MAJOR}")
            installed = subprocess.run(words, capture_output=True, check=False, text=True, env=OUTSIDE, timeout=300)
            if installed.returncode != 0 and not os.environ.get("CI"):
                pytest.skip(f"npm cannot install {PACKAGE}: {installed.stderr[-300:]}")
            assert installed.returncode == 0, installed.stderr
    return folder
