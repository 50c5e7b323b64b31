// A node with @nats-io/transport-node alone: it bids, works with progress, repeats its events on request, and obeys stops.
import { randomBytes } from "node:crypto";
import { connect } from "@nats-io/transport-node";

const { NATS_URL = "nats://127.0.0.1:4222", LOOM_NAMESPACE: ns = "loom", LOOM_OWNER = "local" } = process.env;
const host = `${LOOM_OWNER}.${randomBytes(6).toString("hex")}`, runs = new Map();
const node = { node_id: "shouter", domains: [{ domain: "shout", self_rating: 0.9 }], slots: 9 };
const nc = await connect({ servers: NATS_URL });
const send = (subject, body) => nc.publish(subject, JSON.stringify(body));
const ended = (run) => ["result", "error"].includes(run.events.at(-1)?.kind);
const report = (run, kind, facts) => ended(run) || send(run.subject, run.events[run.events.push({ seq: run.events.length, kind, ...facts }) - 1]);

async function work(run, words) {
  for (const word of words) {
    if (ended(run)) return;
    report(run, "delta", { event: { type: "text_delta", text: `${word} ` } });
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  report(run, "result", { result: { content: words.join(" ") } });
}
function onMessage(error, msg) {
  const body = msg.json(), family = msg.subject.split(".")[1], key = `${body.task_id}:${body.attempt}`;
  if (family === "auction" || family === "call") {
    const fits = body.domain === "shout" && !body.required_tools?.length;
    return send(`${ns}.offer.${host}.${body.answer_to}`, fits ? { bids: [node] } : { decline: "unqualified" });
  }
  const run = runs.get(key) ?? runs.set(key, { events: [], subject: `${ns}.event.${host}.0.0` }).get(key);
  if (family === "stop") return report(run, "error", { error: { code: "cancelled", message: "the run was stopped" } });
  if (run.subject !== msg.reply) send(run.subject, { seq: run.events.length, kind: "moved" }); // to another EXECUTE
  run.subject = msg.reply;
  if (run.events.length) return send(msg.reply, run.events.slice(body.from_seq ?? 0));
  for (const kind of ["accepted", "started"]) report(run, kind);
  work(run, body.description.toUpperCase().split(/\s+/));
}
for (const name of ["auction.*", `call.${host}`, `run.${host}`, `stop.${host}`]) nc.subscribe(`${ns}.${name}`, { callback: onMessage });
for (;; await new Promise((resolve) => setTimeout(resolve, 2000))) {
  send(`${ns}.host.${host}`, { nodes: [node] });
  for (const run of runs.values()) report(run, "heartbeat");
}
