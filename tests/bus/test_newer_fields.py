"""Fields of a newer version pass unknown through all phases into the record."""

import json
from typing import Any

from msgspec.structs import replace
from support.nodes import echo, node
from support.phase_harness import Stage
from support.wait import until

from loom.bus.records import records
from loom.schemas.base import new_id
from loom.schemas.decoding.unknown_fields import with_unknown_fields
from loom.schemas.envelope import Envelope
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission, TaskAd

NEW: dict[str, Any] = {"new": {"a": [1, "x"]}}


async def record_of(stage: Stage, task_id: str) -> dict[str, Any]:
    """Wait for the end of a task and return its record as the bucket holds it."""

    async def ended() -> dict[str, Any] | None:
        entry = await stage.bus.bucket("records", dict[str, Any]).get(task_id)
        return entry.value if entry is not None and entry.value["state"] == "succeeded" else None

    return await until(ended, what="the record of the ended task")  # type: ignore[return-value]


async def test_a_newer_ad_keeps_its_fields_through_all_six_phases(stage: Stage) -> None:
    for phase in ("sense", "match", "scale", "execute", "evaluate", "adapt"):
        await stage.phase(phase)  # type: ignore[arg-type]
    await stage.host([node("n1", echo, code=0.9)])
    ad = with_unknown_fields(TaskAd(task_id="t1", domain="code", description="x", estimated_complexity=0.1), NEW)
    subject = stage.bus.subjects.intake("public", "normal", "t1")
    await stage.bus.jetstream.publish(subject, Submission(ad=ad, submission=new_id()), msg_id=new_id())

    record = await record_of(stage, "t1")
    assert record["envelope"]["ad"]["new"] == NEW["new"]
    assert record["envelope"]["result"]["content"] == "done: x"
    hops = [hop.body for hop in stage.recorded if hop.parsed.family == "task"]
    assert [json.loads(json.dumps(dict(hop.ad.unknown_fields))) for hop in hops] == [NEW] * len(hops)


async def test_fields_a_newer_sense_writes_on_envelope_spec_and_record_stay(stage: Stage) -> None:
    await stage.phase("sense")
    ad = TaskAd(task_id="t1", domain="code", description="x", estimated_complexity=0.1)
    subject = stage.bus.subjects.intake("public", "normal", "t1")
    await stage.bus.jetstream.publish(subject, Submission(ad=ad, submission=new_id()), msg_id=new_id())
    hop: Envelope = await stage.seen("task", phase="match")
    await stage.bus.jetstream.api(f"STREAM.PURGE.{stage.bus.subjects.stream('TASKS')}")

    entry = await records(stage.bus).get("t1")
    assert entry is not None
    assert hop.record_version is not None
    assert hop.spec is not None
    stored = with_unknown_fields(entry.value, NEW)
    revision = await stage.bus.bucket("records", TaskRecord).update("t1", stored, entry.revision)
    known = with_unknown_fields(replace(hop.record_version, revision=revision), NEW)
    newer = with_unknown_fields(replace(hop, spec=with_unknown_fields(hop.spec, NEW), record_version=known), NEW)
    await stage.put("match", newer)
    for phase in ("match", "scale", "execute", "evaluate"):
        await stage.phase(phase)  # type: ignore[arg-type]
    await stage.host([node("n1", echo, code=0.9)])

    record = await record_of(stage, "t1")
    assert record["new"] == record["envelope"]["new"] == record["envelope"]["spec"]["new"] == NEW["new"]
    assert "new" not in record["envelope"]["award"]
