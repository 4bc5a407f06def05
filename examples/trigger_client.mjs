// An unchanged @trigger.dev/sdk client against `headrace serve`: it triggers a batch, reads it, lists, replays, cancels.
//
//   npm install @trigger.dev/sdk        (checked with 4.8.3)
//   HEADRACE_API_KEY=tr_dev_my_own_key headrace serve tasks.py:app
//   TRIGGER_API_URL=http://127.0.0.1:8000 TRIGGER_SECRET_KEY=tr_dev_my_own_key node trigger_client.mjs
//
// tasks.py has a task named "my-task" that takes one value of any kind.
import { batch, configure, runs, tasks } from "@trigger.dev/sdk";

configure({ baseURL: process.env.TRIGGER_API_URL, accessToken: process.env.TRIGGER_SECRET_KEY });

const { batchId, runCount } = await tasks.batchTrigger("my-task", [
  { payload: { i: 0 } },
  { payload: "words", options: { tags: ["a", "b"], metadata: { who: "ada" }, priority: 3 } },
  { payload: { when: new Date(0), big: 123n, set: new Set([1, 2]) } },
  { payload: "x".repeat(200 * 1024) }, // uploaded before it is sent
  { payload: { later: 1 }, options: { delay: "1h", queue: "special", idempotencyKey: "my-key", maxAttempts: 2 } },
]);
console.log(batchId, runCount);

const found = await batch.retrieve(batchId);
for (const id of found.runs) {
  let run = await runs.retrieve(id);
  while (!run.isCompleted && run.status !== "DELAYED") run = await runs.retrieve(id);
  console.log(run.status, run.payload, run.output, run.tags, run.metadata);
}

let count = 0;
for await (const _ of runs.list({ limit: 2, batch: batchId })) count += 1;
console.log("listed", count);
console.log("replayed as", (await runs.replay(found.runs[0])).id);
await runs.cancel(found.runs[4]);
console.log("cancelled", (await runs.retrieve(found.runs[4])).status);
