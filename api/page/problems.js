/** What went wrong, shown in words. */

import { advice } from "./client.js";
import { h, icon } from "./dom.js";
import { ended } from "./words.js";

/** A box that says what happened, why, and what to do. `again` makes a button to try once more. */
export function problemBox(problem, again = null) {
  const help = advice(problem);
  const wait = problem.retryAfter ? ` It may work again in ${problem.retryAfter} s.` : "";
  return h(
    "div",
    { class: "problem", role: "alert" },
    icon("problem"),
    h(
      "div",
      {},
      h("p", { class: "title" }, problem.title ?? "Something in this page failed"),
      problem.detail || !problem.title ? h("p", {}, ended(problem.detail || problem.message)) : null,
      help || wait ? h("p", { class: "help" }, `${help ?? ""}${wait}`.trim()) : null,
      problem.conflicts?.length
        ? h(
            "ul",
            {},
            problem.conflicts.map((one) => h("li", {}, `${one.file}: known as ${one.has}, not ${one.wants}`)),
          )
        : null,
      problem.requestId && problem.kind === "internal"
        ? h("p", {}, "Request ", h("code", {}, problem.requestId))
        : null,
      again ? h("button", { type: "button", onclick: again }, "Try again") : null,
    ),
  );
}
