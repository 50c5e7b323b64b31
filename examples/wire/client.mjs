// A client without loom: `node client.mjs [URL] DESCRIPTION`, with @nats-io/transport-node alone. Ctrl-C cancels the task.
// In an account of a submitter, as docs/tasks.md describes it, the same subjects reach that submitter's tasks alone.
import { connect } from "@nats-io/transport-node";
import { randomUUID } from "node:crypto";

const words = process.argv.slice(2);
const description = words.pop();
const address = new URL(words[0] ?? process.env.NATS_URL ?? "nats://127.0.0.1:4222");
const nc = await connect({
  servers: address.host,
  user: decodeURIComponent(address.username) || undefined,
  pass: decodeURIComponent(address.password) || undefined,
});
const task = randomUUID().replaceAll("-", "");

nc.subscribe(`loom.delta.public.${task}`, {
  callback: (error, msg) => error ?? process.stdout.write(msg.json().event.text ?? ""),
});
process.on("SIGINT", () => nc.request(`loom.cancel.${task}`, "", { timeout: 5_000 }));

const ad = { task_id: task, description, timeout_s: 300 };
const answer = await nc.request("loom.submit", JSON.stringify(ad), { timeout: 310_000 });
const result = answer.json();
console.log("\n" + JSON.stringify(result));
await nc.drain();
process.exitCode = result.state === "succeeded" ? 0 : 1;
