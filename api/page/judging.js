/** Judging: two images at a time, each first for its verdict alone, then again with regions and re-encoded copies. */

import { ask, call, problemFrom } from "./client.js";

const AT_ONCE = 2;
const POLL = 1000; // milliseconds between two looks at a job
const STOPPED = { title: "Stopped", detail: "It was not judged to the end." };

/**
 * A queue of items {name, file, explain, max_false_alarm}; without a file the name is the address of an image, which the
 * service fetches. What comes of one is written into it: `result`, `whole` (nothing
 * of it is missing any more), `at`, or `problem`, which after a verdict is that of its second part.
 *
 * `onchange` gets an item when one of these changes, `onend` is called when nothing is left to do.
 */
export function judging({ onchange, onend }) {
  const queue = [];
  let running = 0;
  let stopping = new AbortController();

  async function work() {
    running += 1;
    while (queue.length) await judge(queue.shift());
    running -= 1;
    if (!running) onend();
  }

  async function judge(item) {
    const brief = item.file && item.explain && !item.result; // for a large image the rest takes many times as long
    item.busy = true;
    item.problem = null;
    onchange(item);
    const query = {
      explain: brief ? null : item.explain,
      max_false_alarm: item.max_false_alarm,
      record: brief ? false : null, // one record for one image: the whole one
    };
    try {
      const {
        results: [found],
      } = await (item.file ? judgeFile : judgeAddress)(item, query, stopping.signal);
      if (found.error) throw problemFrom(found.error);
      item.result = found;
      item.at = new Date().toISOString();
      item.whole = !brief;
      if (brief) queue.push(item); // behind those that have no verdict yet
    } catch (problem) {
      item.problem = problem.name === "AbortError" ? STOPPED : problem;
    }
    item.busy = false;
    onchange(item);
  }

  return {
    add(items) {
      queue.push(...items);
      for (let free = Math.min(AT_ONCE - running, items.length); free > 0; free -= 1) work();
    },
    stop() {
      for (const item of queue.splice(0)) {
        item.problem = STOPPED;
        onchange(item);
      }
      stopping.abort();
      stopping = new AbortController();
    },
  };
}

function judgeFile({ name, file }, query, signal) {
  const body = new FormData();
  body.append("image", file, name || "pasted.png");
  return ask("/v1/detect", { method: "POST", query, body, signal });
}

/** What the service says of an image that it fetches itself, in a job of one. */
async function judgeAddress({ name }, query, signal) {
  const body = new FormData();
  body.append("urls", new Blob([name]), "urls.txt");
  const { id } = await ask("/v1/jobs", { method: "POST", query, body, signal });
  try {
    for (;;) {
      const answer = await ask(`/v1/jobs/${id}/results`, { signal });
      if (answer.results.length) return answer;
      if (answer.next === null) throw STOPPED; // by someone who cancelled all jobs
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  } finally {
    call(`/v1/jobs/${id}`, { method: "DELETE" }).catch(() => {}); // nobody else knows of it
  }
}
