"""Registration and discovery of services, by PING and INFO of the NATS micro protocol (`nats micro ls`).

The name of a service is `<namespace>-<phase>` or `<namespace>-node`. Each instance replies to a request on `$SRV.PING`.
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
"""Seconds to wait for replies, whose number is not known."""

SERVER_TIME, WALL_CLOCK = "server_time", "wall_clock"
"""Keys in the metadata of INFO: the two clocks of the process at its reply, seconds since the epoch."""

WIRE_CHECK_S = 0.1
"""Seconds for which a start waits for processes of another wire version, unless all phases have replied."""

SETTINGS, SETTINGS_DIGEST = "settings", "settings_digest"
"""Keys in the metadata of a phase's INFO: the settings that all processes must share, as JSON, and their digest."""

HEALTH = "health"
"""Key in the metadata of a phase's INFO: its Health as JSON."""

_PING = "io.nats.micro.v1.ping_response"
_INFO = "io.nats.micro.v1.info_response"


class ServiceInstance(CheckedMessage, frozen=True, kw_only=True):
    """One instance of a service, as in a reply to PING."""

    type: str
    name: str
    id: str
    version: str
    metadata: dict[str, str]


class _Info(ServiceInstance, frozen=True, kw_only=True):
    description: str
    endpoints: list[dict[str, str]]


class ServiceEndpoint:
    """Replies to discovery requests for the services of this process.

    Args:
        names: Names of the services: phases, or `node`.
        instance: Id that distinguishes replicas.
        facts: Further metadata of each service.
        config: Settings for the metadata of INFO; default: none.
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
            service_name(bus, name): ServiceInstance(
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
        """Name of a service -> function that returns its health."""

    async def start(self) -> None:
        """Subscribe to discovery requests; returns once the server has processed the subscriptions."""
        subjects = ["$SRV.*"]
        for name, service in self._services.items():
            subjects += [f"$SRV.*.{name}", f"$SRV.*.{name}.{service.id}"]
        for subject in subjects:
            self._subscriptions.append(await self._bus.connection.subscribe(subject, self._on_request))
        await self._bus.requests.flush()

    async def stop(self) -> None:
        """End the subscriptions; safe to call twice or before `start`."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            self._bus.connection.unsubscribe(subscription)

    async def _on_request(self, msg: Msg) -> None:
        _, verb, *rest = msg.subject.split(".")
        services = [self._services[rest[0]]] if rest else self._services.values()
        for service in services:
            if verb == "PING":
                await self._reply(msg.reply, service)
            elif verb == "INFO":
                await self._reply(msg.reply, self._info(service))

    async def _reply(self, reply: str, message: ServiceInstance) -> None:
        if is_inbox(reply, plain=True):  # starting processes of the cluster request each other's services
            await self._bus.connection.publish(reply, message)

    def _info(self, service: ServiceInstance) -> "_Info":
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

    def _health(self, service: ServiceInstance) -> Health | None:
        report = self.health.get(service.metadata["service"])
        if report is None:
            return None
        first = next(iter(self.health)) == service.metadata["service"]  # the counts are those of the whole process
        health = replace(report(), failure=cut_note(self._bus.tasks.failure))
        if not first:
            return health
        discards = self._bus.discards
        return replace(health, discards=dict(discards.counts.most_common(20)), left_out=dict(discards.hosts))


def settings_facts(config: ClusterConfig) -> dict[str, str]:
    """Return the metadata with the settings that all processes must share, and their digest."""
    normal = decode(encode(config), ClusterConfig)  # 300 and 300.0 have the same form then
    stated = msgspec.json.encode(normal.shared, order="sorted")
    return {SETTINGS: stated.decode(), SETTINGS_DIGEST: hashlib.sha256(stated).hexdigest()[:12]}


async def discover(
    bus: Bus, *, within_s: float = ANSWER_S, enough: Callable[[list[ServiceInstance]], bool] = lambda _: False
) -> list[ServiceInstance]:
    """Return the services of this namespace that reply within `within_s`, sorted by name and id.

    Args:
        bus: A connection of any role.
        within_s: Longest wait, in seconds.
        enough: Whether to stop waiting; called after every reply with the services so far.
    """

    def of_namespace(replies: list[ServiceInstance]) -> list[ServiceInstance]:
        return [
            service
            for service in replies
            if service.metadata.get("namespace") == bus.subjects.namespace
            and service.name == service_name(bus, service.metadata.get("service", ""))
        ]

    replies = await request_many(
        bus.requests,
        "$SRV.PING",
        b"",
        _read,
        discards=bus.discards,
        window_s=within_s,
        enough=lambda replies: enough(of_namespace(replies)),
    )
    return sorted(of_namespace(replies), key=lambda service: (service.name, service.id))


def _read(raw: bytes) -> ServiceInstance:
    return decode(raw, ServiceInstance)


async def check_processes(bus: Bus) -> None:
    """Check that no process of another wire version runs in this namespace; takes 0.1 s unless all phases run.

    Raises:
        WireMismatch: A process of another wire version has replied.
    """
    services: list[ServiceInstance] = []

    def enough(replies: list[ServiceInstance]) -> bool:
        if replies[-1].metadata.get("namespace") == bus.subjects.namespace:
            services.append(replies[-1])
        names = {service.metadata.get("service") for service in services}
        return names.issuperset(PHASES) or any(service.metadata.get(WIRE_KEY) != WIRE for service in services)

    await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=WIRE_CHECK_S, enough=enough
    )
    for service in services:
        if service.metadata.get(WIRE_KEY) != WIRE:
            process = f"{service.name} ({service.id}) on {service.metadata.get('host', 'an unknown host')}"
            todo = "stop it and the others of its version, or choose another LOOM_NAMESPACE"
            raise WireMismatch(f"process {process}", service.metadata.get(WIRE_KEY, ""), todo)


class Clocks(NamedTuple):
    """The differences between the clocks of one process and the server's time."""

    services: tuple[str, ...]
    instance: str
    host: str
    server_time_off_s: float
    """The server's time in the process minus the real one, in seconds; includes the transport time of the reply."""
    wall_off_s: float
    """The process's wall clock minus the server's time, in seconds."""


async def clocks(bus: Bus, *, within_s: float = ANSWER_S) -> list[Clocks]:
    """Return the clocks of each process of this namespace that replies within `within_s` seconds."""
    processes: dict[str, Clocks] = {}

    def compare(replies: list[ServiceInstance]) -> bool:
        newest, now = replies[-1], bus.clock.now()
        facts = newest.metadata
        with suppress(KeyError, ValueError):  # another program's service, or a version without clocks
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
    """The settings of one phase that all processes must share."""

    process: str
    """Service and instance, for example `loom-match (3f2a)`."""
    digest: str
    values: dict[str, Any]


async def shared_settings(bus: Bus, *, within_s: float = ANSWER_S) -> list[SharedSettings]:
    """Return the settings of the phases of this namespace that reply within `within_s` seconds, sorted by process."""
    replies = await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=within_s, enough=lambda _: False
    )
    settings = []
    for service in replies:
        if service.metadata.get("namespace") == bus.subjects.namespace and SETTINGS in service.metadata:
            with suppress(Undecodable):  # another program's service
                values = decode(service.metadata[SETTINGS].encode(errors="replace"), dict[str, Any])
                digest = service.metadata.get(SETTINGS_DIGEST, "")
                settings.append(SharedSettings(f"{service.name} ({service.id})", digest, values))
    return sorted(settings, key=lambda entry: entry.process)


async def health_reports(bus: Bus, *, within_s: float = ANSWER_S) -> dict[str, list[Health]]:
    """Return the health reports of the phases of this namespace that reply within `within_s` seconds, by phase."""
    replies = await request_many(
        bus.requests, "$SRV.INFO", b"", _read, discards=bus.discards, window_s=within_s, enough=lambda _: False
    )
    reports: dict[str, list[Health]] = {}
    for service in replies:
        if service.metadata.get("namespace") == bus.subjects.namespace and HEALTH in service.metadata:
            with suppress(Undecodable):  # of another version
                report = decode(service.metadata[HEALTH].encode(errors="replace"), Health)
                reports.setdefault(service.metadata.get("service", ""), []).append(report)
    return reports


def service_name(bus: Bus, name: str) -> str:
    """Return the name of a service of this namespace: `loom-match` for `match`."""
    return f"{bus.subjects.namespace}-{name}"


@cache
def own_version() -> str:
    """Return the version of this installation."""
    return metadata.version("loom-nats")
