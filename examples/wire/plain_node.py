"""A plain node that uses only nats-py and json: it announces itself, and answers each request with a reply."""

import asyncio
import json
import os

import nats

NS, HOST = os.getenv("LOOM_NAMESPACE", "loom"), f"{os.getenv('LOOM_OWNER', 'local')}.{os.urandom(6).hex()}"
NODE = {"node_id": "whisperer", "plain": True, "max_run_s": 30, "domains": [{"domain": "whisper"}]}


async def main():
    nc = await nats.connect(os.getenv("NATS_URL", "nats://127.0.0.1:4222"))

    async def work(msg):
        await msg.respond(json.loads(msg.data)["description"].lower().encode())

    await nc.subscribe(f"{NS}.run.{HOST}", cb=work)
    while True:
        await nc.publish(f"{NS}.host.{HOST}", json.dumps({"nodes": [NODE]}).encode())
        await asyncio.sleep(3)


asyncio.run(main())
