"""A real litellm proxy in front of another server of this machine."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.command import FOREIGN

KEY = "sk-proxy-0123456789abcdef"
UPSTREAM_KEY = "sk-upstream-0123456789abcdef"
START_S = 240.0  # importing litellm takes 10 s on an idle machine
OFFLINE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "HTTP_PROXY": "http://127.0.0.1:9",  # closed, so that an address outside is an error at once
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


@dataclass(frozen=True)
class LitellmProxy:
    """A running proxy."""

    base_url: str
    key: str = KEY


@contextmanager
def litellm_proxy(python: Path, folder: Path, models: Mapping[str, tuple[str, str]]) -> Iterator[LitellmProxy]:
    """Run a proxy for the length of the block.

    Args:
        python: Of an environment that has litellm.
        folder: For its settings and its log.
        models: Name at the proxy -> litellm's own name of the model, and the base URL of its server.
    """
    port = free_port()
    settings, log = folder / "litellm.yaml", folder / "litellm.log"
    settings.write_text(json.dumps(settings_for(models)))  # JSON is YAML
    own = {name: value for name, value in os.environ.items() if not name.startswith((*FOREIGN, "LITELLM_"))}
    words = ("--config", str(settings), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False")
    with log.open("wb") as output:
        process = subprocess.Popen(
            (str(python), "-m", "litellm.proxy.proxy_cli", *words),
            cwd=folder,
            env={**own, **OFFLINE},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_it_answers(process, f"http://127.0.0.1:{port}/health/liveliness", log)
        yield LitellmProxy(base_url=f"http://127.0.0.1:{port}/v1")
    finally:
        process.kill()
        process.wait()


def settings_for(models: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """Return a proxy's settings, under which it passes each error on and tries nothing again by itself."""
    return {
        "model_list": [
            {"model_name": name, "litellm_params": {"model": model, "api_base": url, "api_key": UPSTREAM_KEY}}
            for name, (model, url) in models.items()
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"the proxy ended: {log.read_text()[-2000:]}"
        assert time.monotonic() < until, f"the proxy did not start: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
        except OSError:
            time.sleep(0.1)
        else:
            return
