from collections.abc import Iterator

import pytest
from support.background import Cluster
from support.in_process import Loom, commands
from support.openai_server import OpenAIServer

from loom import AgentConfig, OpenAIProvider


@pytest.fixture
def model() -> Iterator[OpenAIServer]:
    """A well-behaved model behind the OpenAI protocol, in a separate thread."""
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def provider(model: OpenAIServer) -> OpenAIProvider:
    return OpenAIProvider(AgentConfig(api_key="test", base_url=model.base_url))


@pytest.fixture
def loom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Loom]:
    """A function that runs a command in this process; the test sets the environment."""
    with commands(monkeypatch, capsys) as run:
        yield run


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The `cluster` of the module, whose address commands read from the environment."""
    monkeypatch.setenv("NATS_URL", cluster.url)
    monkeypatch.setenv("LOOM_NAMESPACE", cluster.namespace)
    monkeypatch.setenv("COLUMNS", "80")
    return cluster
