/** From a disputed verdict to a reference: the image becomes one, or the one that it is gets another kind. */

import { ask, serviceState } from "./client.js";
import { announce, generatorInput, h } from "./dom.js";
import { effectBars, undo } from "./enrolments.js";
import { problemBox } from "./problems.js";

/**
 * A form with one button for an image that is `label` according to whoever disputed its verdict, and what came of it.
 *
 * `file` is the image itself where this tab has it, else null: the service keeps none.
 */
export function correction({ id, known }, label, file = null) {
  const outcome = h("div", { "aria-live": "polite" });
  const name = generatorInput({ value: known?.generator ?? "" });
  if (label === "fake") serviceState().catch(() => {}); // whose names of generators are offered
  const action = known ? "Relabel the reference" : "Make it a reference";
  const button = h("button", { type: "submit" }, action);
  const form = h(
    "form",
    {
      class: "correction",
      onsubmit: async (event) => {
        event.preventDefault();
        button.disabled = true;
        const generator = label === "fake" ? name.value.trim() : null;
        try {
          const report = await enrol(id, label, generator, file);
          show(told(report, generator, again));
        } catch (problem) {
          outcome.replaceChildren(problemBox(problem));
          return again();
        }
        form.hidden = true;
      },
    },
    !known &&
      !file &&
      h("p", { class: "hint" }, "The image was not kept: the reference will stand on the embedding of this verdict alone."),
    h("div", { class: "buttons" }, label === "fake" && h("label", {}, "Made by the generator ", name), button),
  );
  const again = () => {
    form.hidden = button.disabled = false;
  };
  /** What came of it has the focus, since the button that was pressed goes. */
  const show = (parts) => {
    outcome.replaceChildren(...parts);
    const done = outcome.querySelector(".done");
    done.tabIndex = -1;
    done.focus({ preventScroll: true });
  };
  return h("div", {}, form, outcome);

  function told(report, generator, undone) {
    const { reference, enrolment = null } = report;
    const kind = generator ?? "real photos";
    const place = h("a", { href: `#/references/${reference.id}` }, `reference ${reference.id}`);
    const takeBack = async () => {
      undoing.disabled = true;
      try {
        if (report.former) await ask(`/v1/references/${reference.id}`, { method: "PATCH", json: report.former });
        else if ((await undo([enrolment], `This image of ${kind}`)) === null) return;
        show([h("p", { class: "done" }, report.former ? "Undone: it is what it was." : "Undone.")]);
        undone();
      } catch (problem) {
        outcome.append(problemBox(problem));
      } finally {
        undoing.disabled = false;
        if (undoing.isConnected) undoing.focus();
      }
    };
    const undoing = h("button", { type: "button", onclick: takeBack }, "Undo");
    const words = report.former
      ? [place, ` is one of ${kind} now.`]
      : report.added
        ? ["Enrolled with ", kind, " as ", place, "."]
        : ["Nothing changed: it is ", place, " already."];
    announce(words.map((part) => part.textContent ?? part).join(""));
    return [
      h("p", { class: "done" }, words),
      !report.readable &&
        h(
          "p",
          { class: "hint" },
          "The image itself was not kept, so another checkpoint cannot embed it. Enrol the file under Generators where " +
            "you have it.",
        ),
      report.added > 0 && [h("h3", {}, "What that changed"), effectBars([report], generator)],
      (report.former || enrolment !== null) && h("div", { class: "buttons" }, undoing),
    ]
      .flat(Infinity)
      .filter(Boolean);
  }
}

function enrol(id, label, generator, file) {
  const body = new FormData();
  body.append("label", label);
  if (generator) body.append("generator", generator);
  if (file) body.append("image", file, file.name);
  return ask(`/v1/detections/${id}/enrol`, { method: "POST", body });
}
