// A plain node with @nats-io/transport-node alone: it announces itself, and its reply to a request is the answer.
import { randomBytes } from "node:crypto";
import { connect } from "@nats-io/transport-node";

const { NATS_URL = "nats://127.0.0.1:4222", LOOM_NAMESPACE: ns = "loom", LOOM_OWNER = "local" } = process.env;
const host = `${LOOM_OWNER}.${randomBytes(6).toString("hex")}`;
const node = { node_id: "whisperer", plain: true, max_run_s: 30, domains: [{ domain: "whisper" }] };
const nc = await connect({ servers: NATS_URL });

nc.subscribe(`${ns}.run.${host}`, { callback: (error, msg) => msg.respond(msg.json().description.toLowerCase()) });
for (;;) {
  nc.publish(`${ns}.host.${host}`, JSON.stringify({ nodes: [node] }));
  await new Promise((resolve) => setTimeout(resolve, 3000));
}
