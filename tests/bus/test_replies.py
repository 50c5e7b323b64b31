"""Answers go to inboxes of clients, for plain subjects also to those of the cluster, and to no other subject."""

import json

import pytest
from support.builders import ad, envelope, submission
from support.bus_helpers import Connect, MessageRecorder
from support.phase_harness import Asker, Stage
from support.wait import until

from loom.bus.bus import Bus
from loom.bus.natsio.transport.message import Msg
from loom.bus.replies import MAX_REPLY, is_inbox, send_result
from loom.bus.service_discovery import ServiceEndpoint, discover
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.record import TaskRecord
from loom.schemas.task import Accepted, RunResult, TaskResult

CLIENTS = ["_INBOX.x", "_INBOX.x.1", "_INBOX_ann.x.1", "_INBOXann.x", "_R_.abc.1", "_R_.abc"]
FORGED = [
    "loom.cancel.victim",
    "loom.task.evaluate.normal.t1",
    "$JS.API.STREAM.DELETE.LOOM_TASKS",
    "_INBOX",
    "_INBOX.",
    "_INBOX..x",
    "_INBOX.x.",
    "_INBOX.*",
    "_INBOX.>",
    "_INBOX.a b",
    "_INBOX.x\r\nPUB loom.cancel.victim 0\r\n\r\n",
    "_INBOX.x\n",
    "_INBOX.\u00e4",
    "INBOX.x",
    "x_INBOX.x",
    "_inbox.x",
    "_R_",
    "_R_x.y",
    "_LOOMx.y",
    "_LOOM",
    "_INBOX." + MAX_REPLY * "x",
]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("reply", CLIENTS)
def test_an_inbox_of_a_client_may_be_answered_by_every_subject(reply: str, plain: bool) -> None:
    assert is_inbox(reply, plain=plain)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("reply", ["", *FORGED])
def test_any_other_reply_subject_is_refused(reply: str, plain: bool) -> None:
    assert not is_inbox(reply, plain=plain)


def test_a_cluster_inbox_is_answered_for_requests_by_a_plain_subject() -> None:
    assert is_inbox("_LOOM.scale.scale-1.x.7", plain=True)
    assert not is_inbox("_LOOM.scale.scale-1.x.7")


@pytest.mark.parametrize("family", ["submit", "status", "cancel"])
@pytest.mark.parametrize("reply", ["LOOM.x.cancelled.y", "$JS.API.STREAM.PURGE.KV", "_LOOM.sense.x.1"])
async def test_a_request_with_another_reply_subject_takes_effect_and_its_refused_answer_is_counted(
    stage: Stage, family: str, reply: str
) -> None:
    sense = await stage.phase("sense")
    answers = MessageRecorder()
    await stage.bus.connection.subscribe(reply, answers)
    await stage.record(envelope(ad(task_id="t1"), now=stage.bus.clock.now(), submitter="ann"))
    tokens = () if family == "submit" else ("t1",)
    body = ad(task_id="t2") if family == "submit" else b""
    payload = body if isinstance(body, bytes) else encode(body)
    await stage.bus.connection.publish(stage.bus.subjects.of(family, "ann", *tokens), payload, reply=reply)
    await until(lambda: sense.bus.discards.counts["reply_refused"] == 1, what="the reply subject is counted")
    if family == "submit":
        await stage.settled("INTAKE")
        assert (await stage.read("t2")).reply_to == ()
    elif family == "cancel":
        await stage.seen("task", phase="evaluate", task_id="t1")
    await sense.bus.requests.flush()
    assert not answers.messages
    assert sense.bus.discards.counts["reply_refused"] == 1


async def test_a_refused_ad_is_not_reported_to_another_reply_subject_either(stage: Stage) -> None:
    sense = await stage.phase("sense")
    answers = MessageRecorder()
    await stage.bus.connection.subscribe("forged.>", answers)
    await stage.bus.connection.publish(stage.bus.subjects.submit, b"{", reply="forged.x")
    await until(lambda: sense.bus.discards.counts["reply_refused"] == 1, what="the reply subject is counted")
    await sense.bus.requests.flush()
    assert not answers.messages


@pytest.mark.parametrize("reply_to", FORGED)
async def test_a_stored_reply_subject_is_treated_alike(stage: Stage, reply_to: str) -> None:
    sense = await stage.phase("sense")
    task = ad()
    sent = submission(task, reply_to=reply_to[:MAX_REPLY])
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", task.task_id), sent)
    await stage.settled("INTAKE")
    refused = not is_inbox(sent.reply_to, plain=True)
    assert (await stage.read(task.task_id)).reply_to == (() if refused else (sent.reply_to,))
    assert sense.bus.discards.counts["reply_refused"] == refused


async def test_a_stored_inbox_of_the_cluster_counts_only_for_submitters_without_a_name(stage: Stage) -> None:
    await stage.phase("sense")
    reply = "_LOOM.operator.operator-1.x.3"
    for submitter, kept in (("public", (reply,)), ("ann", ())):
        task = ad()
        sent = submission(task, reply_to=reply)
        await stage.bus.jetstream.publish(stage.bus.subjects.intake(submitter, "normal", task.task_id), sent)
        await stage.settled("INTAKE")
        assert (await stage.read(task.task_id)).reply_to == kept


async def test_a_queued_task_that_is_cancelled_keeps_no_forged_reply_subject(stage: Stage) -> None:
    await stage.put("match", envelope(now=stage.bus.clock.now()))
    await stage.phase("sense", ClusterConfig(max_in_flight=1))  # admits nothing more
    await stage.gate_measured()
    task, asker = ad(), Asker(stage.bus)
    sent = submission(task, reply_to="forged.x")
    await stage.bus.jetstream.publish(stage.bus.subjects.intake("public", "normal", task.task_id), sent)
    await asker.ask(stage.bus.subjects.of("cancel", task.task_id))
    await asker.answer(TaskResult)
    assert (await stage.read(task.task_id)).reply_to == ()


async def test_a_forged_reply_subject_in_a_record_gets_no_result(plain: Bus, connect: Connect) -> None:
    listener, received = await connect(), MessageRecorder()
    await listener.connection.subscribe("forged.>", received)
    await listener.requests.flush()
    env = envelope(now=plain.clock.now(), result=RunResult(content="42"))
    record = TaskRecord(task_id=env.task_id, state="succeeded", envelope=env, admitted_at=1.0)
    await send_result(plain, "forged.x", record)
    await plain.requests.flush()
    await listener.requests.flush()
    assert not received.messages
    assert plain.discards.counts["reply_refused"] == 1


async def test_phases_scale_and_operators_get_their_answer_to_a_cancel_by_the_plain_subject(stage: Stage) -> None:
    await stage.phase("sense")
    for role in ("scale", "execute", "operator"):
        bus = await stage.connect(role)
        asker = Asker(bus)
        assert asker.inbox.startswith(f"_LOOM.{role}.")
        await stage.record(envelope(ad(task_id=f"of-{role}"), now=stage.bus.clock.now(), submitter="ann"))
        await asker.ask(bus.subjects.of("cancel", f"of-{role}"))
        assert (await asker.answer(TaskResult)).state == "cancelled"


async def test_discovery_is_answered_to_every_role(stage: Stage) -> None:
    sense = await stage.connect("sense")
    presence = ServiceEndpoint(sense, ["sense"], "i-1")
    await presence.start()
    for role in ("client", "operator", "node"):
        other = await stage.connect(role)
        assert [each.id for each in await discover(other, within_s=5, enough=bool)] == ["i-1"]
    answers: list[Msg] = []
    await stage.bus.connection.subscribe_sync("forged.>", answers.append)
    await stage.bus.connection.publish("$SRV.PING", reply="forged.x")
    await stage.bus.requests.flush()
    await sense.requests.flush()
    assert not answers
    await presence.stop()


async def test_a_request_that_is_refused_has_code_message_and_field_and_nothing_else(stage: Stage) -> None:
    await stage.phase("sense")
    asker, subjects = Asker(stage.bus), stage.bus.subjects
    await asker.ask(subjects.submit, b'{"description": "x", "priority": "soon"}')
    assert (await asker.error()).code == "invalid_task"
    await asker.ask(subjects.of("status", "unknown"))
    assert (await asker.error(count=2)).code == "unknown_task"
    await asker.ask(subjects.submit, ad(wait=False))
    await asker.answer(Accepted, count=3)
    bodies = [json.loads(msg.data) for msg in asker.answers]
    assert [set(body) for body in bodies[:2]] == [{"code", "message", "field"}, {"code", "message"}]
    assert "state" in bodies[2]
