"""Who serves here: discovery as NATS services do it, PING and INFO of the micro protocol (`nats micro ls`).

A service is named `<namespace>-<what>`, and whoever asks `$SRV.PING` gets one answer from each instance.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.request_many import request_many
from loom.bus.natsio.transport.message import Msg
from loom.bus.replies import is_inbox
from loom.bus.wire_version import WIRE, WIRE_KEY, WireMismatch
from loom.schemas.base import CheckedMessage, Undecodable, cut_note, decode, encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES

ANSWER_S = 0.5
"""How long to listen for answers: nobody knows how many there will be."""

SERVER_TIME, WALL_CLOCK = "server_time", "wall_clock"
"""Metadata of INFO: the process's two clocks at its answer, seconds since the epoch."""

WIRE_CHECK_S = 0.1
"""How long a start waits for processes of another wire version, unless all phases have answered."""

SETTINGS, SETTINGS_DIGEST = "settings", "settings_digest"
"""Metadata of a phase's INFO: the settings that all processes must have in common, as JSON, and a digest of them."""

HEALTH = "health"
"""Metadata of a phase's INFO: its Health as JSON."""

_PING = "io.nats.micro.v1.ping_response"
_INFO = "io.nats.micro.v1.info_response"


class Present(CheckedMessage, frozen=True, kw_only=True):
    """One instance of a service, as the micro protocol words it."""

    type: str
    name: str
    id: str
    version: str
    metadata: dict[str, str]


class _Info(Present, frozen=True, kw_only=True):
    description: str
    endpoints: list[dict[str, str]]


class ServiceEndpoint:
    """Answers discovery for services of this process.

    Args:
        names: What they are: the phases, or `node`.
        instance: Tells replicas apart.
        facts: Further metadata of each.
        config: Whose settings INFO states; absent: none.
    """

    def __init__(
        self,
        bus: Bus,
        names: Sequence[str],
        instance: str,
        facts: Mapping[str, str] | None = None,
        config: ClusterConfig | None = None,
    ) -> None:
        self._bus = bus
        common = {"namespace": bus.subjects.namespace, "host": socket.gethostname(), WIRE_KEY: WIRE, **(facts or {})}
        self._services = {
            service_name(bus, name): Present(
                type=_PING,
                name=service_name(bus, name),
                id=instance,
                version=own_version(),
                metadata={**common, "service": name},
            )
            for name in names
        }
        self._settings = settings_facts(config) if config is not None else {}
        self._subscriptions: list[Subscription] = []
        self.health: dict[str, Callable[[], Health]] = {}
        """Name -> returns how far its work has got."""

    async def start(self) -> None:
        """Begin to answer."""
        subjects = ["$SRV.*"]
        for name, service in self._services.items():
            subjects += [f"$SRV.*.{name}", f"$SRV.*.{name}.{service.id}"]
        for subject in subjects:
            self._subscriptions.append(await self._bus.connection.subscribe(subject, self._on_question))
        await self._bus.requests.flush()

    async def stop(self) -> None:
        """Answer no more; safe to call twice or unstarted."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            self._bus.connection.unsubscribe(subscription)

    async def _on_question(self, msg: Msg) -> None:
        _, verb, *rest = msg.subject.split(".")
        asked = [self._services[rest[0]]] if rest else self._services.values()
        for service in asked:
            if verb == "PING":
                await self._answer(msg.reply, service)
            elif verb == "INFO":
                await self._answer(msg.reply, self._info(service))

    async def _answer(self, reply: str, message: Present) -> None:
        if is_inbox(reply, plain=True):  # processes of a cluster look for each other at their start
            await self._bus.connection.publish(reply, message)

    def _info(self, service: Present) -> "_Info":
        health = self._health(service)
        clocks = {SERVER_TIME: f"{self._bus.clock.now():.3f}", WALL_CLOCK: f"{time.time():.3f}"}
        report = {} if health is None else {HEALTH: encode(health).decode()}
        return _Info(
            type=_INFO,
            name=service.name,
            id=service.id,
            version=service.version,
            metadata={**service.metadata, **clocks, **self._settings, **report},
            description=f"{service.metadata['service']} of a loom cluster",
            endpoints=[],
        )

    def _health(self, service: Present) -> Health | None:
        report = self.health.get(service.metadata["service"])
        if report is None:
            return None
        first = next(iter(self.health)) == service.metadata["service"]  # the counts are those of the whole process
        report_here = replace(report(), failure=cut_note(self._bus.tasks.failure))
        if not first:
            return report_here
        discards = self._bus.discards
        return replace(report_here, discards=dict(discards.counts.most_common(20)), left_out=dict(discards.hosts))


def settings_facts(config: ClusterConfig) -> dict[str, str]:
    """Return the metadata that states the settings which all processes must have in common."""
    as_read = decode(encode(config), ClusterConfig)  # one form of each number: 300 and 300.0 are the same
    stated = msgspec.json.encode(as_read.shared, order="sorted")
    return {SETTINGS: stated.decode(), SETTINGS_DIGEST: hashlib.sha256(stated).hexdigest()[:12]}


async def discover(
    bus: Bus, *, within_s: float = ANSWER_S, enough: Callable[[list[Present]], bool] = lambda _: False
) -> list[Present]:
    """Return the services of this namespace that answer in `within_s`, sorted by name and id.

    Args:
        bus: A connection of any role.
        enough: Whether to stop listening; asked after every answer.
    """

    def ours(answers: list[Present]) -> list[Present]:
        return [
            each
            for each in answers
            if each.metadata.get("namespace") == bus.subjects.namespace
            and each.name == service_name(bus, each.metadata.get("service", ""))
        ]

    answers = await request_many(
        bus.requests,
        "$SRV.PING",
        b"",
        _read,
        discards=bus.discards,
        window_s=within_s,
        enough=lambda answers: enough(ours(answers)),
    )
    return sorted(ours(answers), key=lambda each: (each.name, each.id))


def _read(raw: bytes) -> Present:
    return decode(raw, Present)


async def check_processes(bus: Bus) -> None:
    """Return unless a process of another wire version runs in this namespace; takes 0.1 s where phases are missing.

    Raises:
        WireMismatch: Such a process has answered.
    """
    ours: list[Present] = []

    def enough(answers: list[Present]) -> bool:
        if answers[-1].metadata.get("namespace") == bus.subjects.namespace:
            ours.append(answers[-1])
        answered = {each.metadata.get("service") for each in ours}
        return answered.issuperset(PHASES) or any(each.metadata.get(WIRE_KEY) != WIRE for each in ours)

    await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=WIRE_CHECK_S, enough=enough
    )
    for each in ours:
        if each.metadata.get(WIRE_KEY) != WIRE:
            process = f"{each.name} ({each.id}) on {each.metadata.get('host', 'an unknown host')}"
            todo = "stop it and the others of its version, or choose another LOOM_NAMESPACE"
            raise WireMismatch(f"process {process}", each.metadata.get(WIRE_KEY, ""), todo)


class Clocks(NamedTuple):
    """The clocks of one process beside those of the process that asked."""

    services: tuple[str, ...]
    instance: str
    host: str
    server_time_off_s: float
    """What the process takes for the server's time, less what it is; the time of the answer's way is in it."""
    wall_off_s: float
    """The process's wall clock, less the server's time."""


async def clocks(bus: Bus, *, within_s: float = ANSWER_S) -> list[Clocks]:
    """Return the clocks of every process of this namespace that answers in `within_s`, one entry each."""
    processes: dict[str, Clocks] = {}

    def compare(answers: list[Present]) -> bool:
        newest, now = answers[-1], bus.clock.now()
        facts = newest.metadata
        with suppress(KeyError, ValueError):  # another program's service, or of a version without clocks
            if facts["namespace"] == bus.subjects.namespace:
                known = processes.get(newest.id)
                processes[newest.id] = Clocks(
                    (*(known.services if known else ()), newest.name),
                    newest.id,
                    facts["host"],
                    float(facts[SERVER_TIME]) - now,
                    float(facts[WALL_CLOCK]) - now,
                )
        return False

    await request_many(bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=within_s, enough=compare)
    return sorted(processes.values())


class SharedSettings(NamedTuple):
    """The settings of one phase that all processes must have in common."""

    process: str
    """Its service and instance, as `loom-match (3f2a)`."""
    digest: str
    values: dict[str, Any]


async def shared_settings(bus: Bus, *, within_s: float = ANSWER_S) -> list[SharedSettings]:
    """Return the settings of the phases of this namespace that answer in `within_s`, sorted by process."""
    answers = await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=within_s, enough=lambda _: False
    )
    found = []
    for each in answers:
        if each.metadata.get("namespace") == bus.subjects.namespace and SETTINGS in each.metadata:
            with suppress(Undecodable):  # of another program
                values = decode(each.metadata[SETTINGS].encode(errors="replace"), dict[str, Any])
                digest = each.metadata.get(SETTINGS_DIGEST, "")
                found.append(SharedSettings(f"{each.name} ({each.id})", digest, values))
    return sorted(found, key=lambda each: each.process)


async def health_reports(bus: Bus, *, within_s: float = ANSWER_S) -> dict[str, list[Health]]:
    """Return what the phases of this namespace that answer in `within_s` report, by phase."""
    answers = await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=within_s, enough=lambda _: False
    )
    reports: dict[str, list[Health]] = {}
    for each in answers:
        if each.metadata.get("namespace") == bus.subjects.namespace and HEALTH in each.metadata:
            with suppress(Undecodable):  # of another version
                report = decode(each.metadata[HEALTH].encode(errors="replace"), Health)
                reports.setdefault(each.metadata.get("service", ""), []).append(report)
    return reports


def service_name(bus: Bus, name: str) -> str:
    """Return what a service of this namespace is called: `loom-match` for `match`."""
    return f"{bus.subjects.namespace}-{name}"


@cache
def own_version() -> str:
    """Return the version of this installation."""
    return metadata.version("loom-nats")
