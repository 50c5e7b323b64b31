"""The profiles of the floor: written by ADAPT after rewards, and received by MATCH."""

import asyncio

from bench.floor.floor_client import FloorClient, expected_sequence
from bench.floor.floor_world import MessageSizes
from loom.bus.natsio.transport.message import Msg

BATCH_S = 0.02
"""Seconds after a reward until the profiles of all rewarded nodes are written."""


class FloorProfiles:
    """Receives rewards, and writes a profile and a lifecycle message of each rewarded node."""

    def __init__(self, client: FloorClient, sizes: MessageSizes) -> None:
        self._client, self._sizes = client, sizes
        self._revisions: dict[str, int] = {}
        """Node id -> revision of its profile."""
        self._rewarded: set[str] = set()
        self._writing: set[str] = set()

    async def start_writing(self) -> None:
        """Subscribe to rewards and to the own profiles, as ADAPT does."""
        await self._client.subscribe(self._client.subjects.of("reward", "*", "*", "*", "*"), self._on_reward)
        await self.start_reading()

    async def start_reading(self) -> None:
        """Subscribe to profiles, as MATCH does."""
        await self._client.subscribe(f"$KV.{self._client.subjects.bucket('nodes')}.>", lambda _: None)

    def _on_reward(self, msg: Msg) -> None:
        if not self._rewarded:
            asyncio.get_running_loop().call_later(BATCH_S, self._write)
        self._rewarded.add(msg.subject.split(".")[4])

    def _write(self) -> None:
        nodes, self._rewarded = self._rewarded - self._writing, set()
        for node in nodes:
            self._writing.add(node)
            self._write_profile(node)

    def _write_profile(self, node: str) -> None:
        def publish_lifecycle(revision: int) -> None:
            self._writing.discard(node)
            self._revisions[node] = revision
            lifecycle = self._client.subjects.of("lifecycle", "adapt", "learned", "local", node)
            self._client.publish(lifecycle, "", b"x" * self._sizes.lifecycle, b"")

        subject = f"$KV.{self._client.subjects.bucket('nodes')}.local.{node}"
        headers = expected_sequence(self._revisions.get(node, 0))
        self._client.store(subject, b"x" * self._sizes.profile, headers, publish_lifecycle)
