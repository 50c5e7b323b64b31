"""A node that uses only nats-py and json: it bids, reports progress, repeats events on request, and can be stopped."""
import asyncio, json, os
import nats

NS, HOST = os.getenv("LOOM_NAMESPACE", "loom"), f"{os.getenv('LOOM_OWNER', 'local')}.{os.urandom(6).hex()}"
NODE = {"node_id": "shouter", "domains": [{"domain": "shout", "self_rating": 0.9}], "slots": 9}

async def main(runs):
    nc = await nats.connect(os.getenv("NATS_URL", "nats://127.0.0.1:4222"))
    send = lambda subject, body: nc.publish(subject, json.dumps(body).encode())
    ended = lambda run: run["events"] and run["events"][-1]["kind"] in ("result", "error")
    async def emit(run, kind, **fields):
        if not ended(run):
            run["events"].append({"seq": len(run["events"]), "kind": kind, **fields})
            await send(run["subject"], run["events"][-1])
    async def work(run, words):
        for word in filter(lambda _: not ended(run), words):
            await emit(run, "delta", event={"type": "text_delta", "text": word + " "})
            await asyncio.sleep(0.01)
        await emit(run, "result", result={"content": " ".join(words)})
    async def on_message(msg):
        body, family = json.loads(msg.data), msg.subject.split(".")[1]
        if family in ("auction", "call"):
            fits = body["domain"] == "shout" and not body.get("required_tools")
            offer = {"bids": [NODE]} if fits else {"decline": "unqualified"}
            return await send(f"{NS}.offer.{HOST}.{body['answer_to']}", offer)
        run = runs.setdefault((body["task_id"], body["attempt"]), {"events": [], "subject": f"{NS}.event.{HOST}.0.0"})
        if family == "stop": return await emit(run, "error", error={"code": "cancelled", "message": "it was stopped"})
        old, run["subject"] = run["subject"], msg.reply
        if old != msg.reply: await send(old, {"seq": len(run["events"]), "kind": "moved"})
        if run["events"]: return await send(msg.reply, run["events"][body.get("from_seq", 0) :])
        await asyncio.gather(emit(run, "accepted"), emit(run, "started"))
        run["work"] = asyncio.create_task(work(run, body["description"].upper().split()))
    for name in ("auction.*", f"call.{HOST}", f"run.{HOST}", f"stop.{HOST}"):
        await nc.subscribe(f"{NS}.{name}", cb=on_message)
    while True:
        await send(f"{NS}.host.{HOST}", {"nodes": [NODE]})
        await asyncio.gather(asyncio.sleep(2), *[emit(run, "heartbeat") for run in runs.values()])
asyncio.run(main({}))
