import pytest


@pytest.fixture(autouse=True)
def hosts_gathered_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """MATCH starts its first auction sooner, because a test has few hosts, which announce themselves quickly."""
    monkeypatch.setattr("loom.phases.match.service.ANNOUNCE_WAIT_S", 0.1)
