"""Findings on what the processes and streams of a namespace must have in common: the wire version and the settings."""

from collections.abc import Iterable, Iterator
from typing import Any

from loom.bus.service_discovery import ServiceInstance, SharedSettings
from loom.bus.topology import Inspection
from loom.bus.wire_version import RESET, WIRE, WIRE_KEY, wire_of
from loom.runner.doctor.findings import Finding, fail, ok, warn
from loom.schemas.base import cut_note, encode

MOST_PROCESSES = 4
"""Processes that a finding names for each value of a setting."""


def wire(seen: Inspection, services: Iterable[ServiceInstance]) -> Iterator[Finding]:
    """Judge the wire versions of streams, buckets and processes; versions that agree yield no finding."""
    for name, part in seen.streams.items():
        if part.info is not None and wire_of(part.info["config"]) != WIRE:
            todo = f"finish its tasks with that version, then `{RESET}`, or choose another LOOM_NAMESPACE"
            yield fail("wire", f"{name} has {_named(wire_of(part.info['config']))}, this is {WIRE}", todo)
    for service in services:
        if service.metadata.get(WIRE_KEY) != WIRE:
            version = _named(service.metadata.get(WIRE_KEY, ""))
            yield fail("wire", f"{service.name} ({service.id}) has {version}, this is {WIRE}", "upgrade all alike")


def _named(version: str) -> str:
    return f"wire version {version}" if version else "no wire version"


def settings(processes: list[SharedSettings]) -> Iterator[Finding]:
    """Judge whether the phases that answer have the same settings; no finding where none states them."""
    if len({each.digest for each in processes}) == 1:
        yield ok("settings", f"the same in {len(processes)} phases ({processes[0].digest})")
    names = sorted({name for each in processes for name in each.values})
    for name in names:
        holders: dict[str, list[str]] = {}
        for each in processes:
            holders.setdefault(_shown(each.values.get(name)), []).append(each.process)
        if len(holders) > 1:
            parts = (f"{value} in {_listed(who)}" for value, who in sorted(holders.items()))
            todo = f"give all processes the same LOOM_{name.upper()} and start them again"
            yield warn("settings", cut_note(f"{name} is {', '.join(parts)}"), todo)


def _shown(value: Any) -> str:
    return "absent" if value is None else encode(value).decode()


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_PROCESSES
    return " ".join(sorted(names)[:MOST_PROCESSES]) + (f" and {more} more" if more > 0 else "")
