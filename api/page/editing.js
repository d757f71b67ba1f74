/** Changing references: relabelling, with a way back, and removing, one after the other. */

import { ask } from "./client.js";
import { confirmed, h } from "./dom.js";
import { problemBox } from "./problems.js";
import { plural } from "./words.js";

/**
 * `relabel`, `change` and `remove` for references, which are at least {id, label, generator}.
 *
 * `outcome` is where they say how far they are. `settled` is called at the end, before they say what was done there,
 * with a map of the ids that are gone: to what each reference is now, or to null.
 */
export function editing(outcome, settled) {
  async function relabel(references) {
    const kind = h(
      "select",
      { name: "kind" },
      h("option", { value: "fake" }, "a generated image"),
      h("option", { value: "real" }, "a real photo"),
    );
    const name = h("input", {
      type: "text",
      list: "generator-names",
      maxlength: 100,
      required: true,
      autocomplete: "off",
      spellcheck: "false",
      value: references[0].generator ?? "",
    });
    const nameLabel = h("label", {}, "Generator ", name);
    kind.value = references[0].label;
    kind.onchange = () => {
      name.disabled = nameLabel.hidden = kind.value === "real";
    };
    kind.onchange();
    const title = references.length === 1 ? `What is reference ${references[0].id}?` : `What are these ${references.length}?`;
    if (!(await confirmed(title, h("div", {}, h("label", {}, "It is ", kind), " ", nameLabel), "Relabel"))) return;
    const made = kind.value === "real" ? null : name.value.trim();
    await change(references.map(({ id }) => ({ id, label: kind.value, generator: made })));
  }

  /** Let each be of the kind that it names, then offer to take that back. */
  async function change(wanted) {
    const undo = [];
    const gone = new Map();
    const problem = await each(wanted, "Relabelled", async ({ id, label, generator }) => {
      const now = await ask(`/v1/references/${id}`, { method: "PATCH", json: { label, generator } });
      if (now.id === id) return; // it was that already
      gone.set(id, now);
      const { former_label: formerLabel, former_generator: formerGenerator = null } = now.attributes;
      if (formerLabel) undo.push({ id: now.id, label: formerLabel, generator: formerGenerator });
    });
    const button = h("button", { type: "button", onclick: () => change(undo) }, "Undo");
    await settle(`${plural(gone.size, "reference")} relabelled.`, problem, gone, undo.length ? button : null);
  }

  async function remove(references) {
    const what = references.length === 1 ? `reference image ${references[0].id}` : plural(references.length, "reference image");
    const text = "What is removed votes no more, and its picture goes too. Past verdicts stay as they are.";
    if (!(await confirmed(`Remove ${what}?`, text, "Remove"))) return;
    const gone = new Map();
    const problem = await each(references, "Removed", async ({ id }) => {
      await ask(`/v1/references/${id}`, { method: "DELETE" });
      gone.set(id, null);
    });
    await settle(`${plural(gone.size, "reference")} removed.`, problem, gone);
  }

  /** Do something with each reference, and say how far it is; answers with the problem that ended it, if one did. */
  async function each(references, verb, work) {
    for (const [number, reference] of references.entries()) {
      outcome.replaceChildren(h("p", {}, `${verb} ${number} of ${references.length}…`));
      try {
        await work(reference);
      } catch (problem) {
        return problem;
      }
    }
    return null;
  }

  async function settle(words, problem, gone, button = null) {
    await settled(gone);
    const done = h("div", { class: "selection" }, h("p", { class: "done" }, words), button);
    outcome.replaceChildren(...[problem && problemBox(problem), done].filter(Boolean));
  }

  return { relabel, change, remove };
}
