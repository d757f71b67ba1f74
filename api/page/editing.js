/** Changing references: relabelling, with a way back, and removing, one after the other. */

import { ask, patiently } from "./client.js";
import { confirmed, generatorInput, h } from "./dom.js";
import { problemBox } from "./problems.js";
import { plural } from "./words.js";

const TRIES = 10; // for each reference, while the service is too busy

/**
 * `relabel`, `change` and `remove` for references, which are at least {id, label, generator}.
 *
 * `outcome` is where they say how far they are. `settled` is called at the end, before they say what was done there,
 * with a map of the ids that are gone: to what each reference is now, or to null. `controls` cannot be used meanwhile.
 */
export function editing(outcome, settled, controls) {
  async function relabel(references) {
    const kind = h(
      "select",
      { name: "kind" },
      h("option", { value: "fake" }, "a generated image"),
      h("option", { value: "real" }, "a real photo"),
    );
    const name = generatorInput({ value: references[0].generator ?? "" });
    const nameLabel = h("label", {}, "Generator ", name);
    kind.value = references[0].label;
    kind.onchange = () => {
      name.disabled = nameLabel.hidden = kind.value === "real";
    };
    kind.onchange();
    const title = references.length === 1 ? `What is reference ${references[0].id}?` : `What are these ${references.length}?`;
    if (!(await confirmed(title, h("div", {}, h("label", {}, "It is ", kind), " ", nameLabel), "Relabel"))) return;
    const made = kind.value === "real" ? null : name.value.trim();
    await change(references, () => ({ label: kind.value, generator: made }));
  }

  /** Let each be of the kind {label, generator} that `kindOf` gives for it, then offer to take that back. */
  async function change(references, kindOf, verb = "Relabelled") {
    const [changed, former] = [[], new Map()];
    const takeBack = () => change(changed, ({ id }) => former.get(id), "Taken back");
    const button = h("button", { type: "button", hidden: true, onclick: takeBack }, "Undo");
    await each(references, verb, button, async (reference) => {
      const { id, label, generator = null } = reference;
      const now = await ask(`/v1/references/${id}`, { method: "PATCH", json: kindOf(reference) });
      if (now.id !== id) {
        changed.push(now);
        former.set(now.id, { label, generator });
        button.hidden = false;
      }
      return now;
    });
  }

  async function remove(references) {
    const what = references.length === 1 ? `reference image ${references[0].id}` : plural(references.length, "reference image");
    const text = "What is removed votes no more, and its picture goes too. Past verdicts stay as they are.";
    if (!(await confirmed(`Remove ${what}?`, text, "Remove"))) return;
    await each(references, "Removed", null, async ({ id }) => {
      await ask(`/v1/references/${id}`, { method: "DELETE" });
      return null;
    });
  }

  /**
   * Do something with each reference that gives what it is then, until there is a problem; say how far it is, then what
   * was done, with a button. One that somebody else removed is passed over.
   */
  async function each(references, verb, button, work) {
    const gone = new Map();
    let [lost, problem] = [0, null];
    for (const control of controls) control.inert = true;
    for (const [number, reference] of references.entries()) {
      outcome.replaceChildren(h("p", {}, `${verb} ${number} of ${references.length}…`));
      try {
        const now = await patiently(() => work(reference), TRIES);
        if (now?.id !== reference.id) gone.set(reference.id, now); // otherwise it was that already
      } catch (error) {
        if (error.status !== 404) {
          problem = error;
          break;
        }
        gone.set(reference.id, null);
        lost += 1;
      }
    }
    await settled(gone);
    for (const control of controls) control.inert = false;
    const words = `${plural(gone.size - lost, "reference")} ${verb.toLowerCase()}.`;
    const missing = lost ? ` ${plural(lost, "reference")} had been removed already.` : "";
    const done = h("p", { class: "done", tabindex: "-1" }, words + missing);
    outcome.replaceChildren(...[problem && problemBox(problem), h("div", { class: "selection" }, done, button)].filter(Boolean));
    if (document.activeElement === document.body) done.focus({ preventScroll: true }); // the button that had it is gone
  }

  return { relabel, change, remove };
}
