"""Virtual environments for software that loom is tested against and does not depend on.

`tests/environments/NAME.txt` pins each package and the hashes of its files. The environment is made on first use, in
a folder of the system's temporary directory, and kept between runs. A changed file or another Python makes another
environment. Renew a file by

    uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -o NAME.txt NAME.in
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[1] / "environments"
WITH_LOOM = Path(__file__).with_name("with_loom.py")
INSTALL_S = 600
INSTALL = ("--quiet", "--disable-pip-version-check", "--retries", "2", "--only-binary", ":all:")
OUTSIDE = dict(os.environ)
"""The developer's own settings, which the tests take away: pip may need a proxy or certificates of them."""
PINNED = ("--require-hashes", "--no-deps")  # the file is complete: pip has nothing to resolve


class NotInstallable(Exception):
    """An environment that cannot be made here; its text is the reason."""


def python_of(name: str) -> Path:
    """Return the Python of an environment; skip the test where it cannot be made, but for CI, which needs it."""
    try:
        return installed(name)
    except NotInstallable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the environment {name} cannot be made: {error}")


@cache
def installed(name: str) -> Path:
    """Return the Python of an environment, made first where it does not exist.

    Raises:
        NotInstallable: pip finds no network, or a package has no wheel for this Python and platform.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    identity = requirements.read_bytes() + f"{sys.version} {sys.base_prefix} {sysconfig.get_platform()}".encode()
    folder = own_folder() / f"{name}-{hashlib.sha256(identity).hexdigest()[:16]}"
    python, complete = folder / "bin" / "python", folder / ".complete"
    with locked(folder.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            run(sys.executable, "-m", "venv", str(folder))
            run(str(python), "-m", "pip", "install", *INSTALL, *PINNED, "--requirement", str(requirements))
            complete.touch()
    return python


def with_loom(python: Path, module: str) -> tuple[str, ...]:
    """Return the command that runs a module in an environment to which the running one's packages are added."""
    return (str(python), str(WITH_LOOM), sysconfig.get_path("purelib"), module)


def own_folder() -> Path:
    """Return the folder of all environments; its programs are run, so another user's is refused.

    Raises:
        NotInstallable: Another user owns it.
    """
    folder = Path(tempfile.gettempdir()) / f"loom-environments-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise NotInstallable(f"{folder} belongs to another user, or others may write to it: remove it")
    return folder


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes out; the lock of a process that dies is free."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(*words: str) -> None:
    """Run a command to its end.

    Raises:
        NotInstallable: It failed; the reason is its last error.
    """
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=INSTALL_S, env=OUTSIDE)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR:")]
        raise NotInstallable(lines[-1] if lines else f"exit code {error.returncode}: {error.stderr}") from error
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(f"not installed within {INSTALL_S} s") from error
