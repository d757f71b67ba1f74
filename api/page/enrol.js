/** Enrolling: a folder of images becomes references, a batch at a time, with a report and a way back. */

import { ask, Problem } from "./client.js";
import { announce, generatorInput, h } from "./dom.js";
import { effectBars, ofOneFolder, reportWords, undo } from "./enrolments.js";
import { intake, looksLikeImage } from "./intake.js";
import { problemBox } from "./problems.js";
import { bytes, plural } from "./words.js";

const MOST_FILES = 32;
const MOST_BYTES = 64 * 2 ** 20;
/** Problems of one file of a batch: the batch is halved until it is known which. */
const OF_A_FILE = new Set([400, 413, 415]);

/**
 * The form, and `clear` for its last report. `onchange` is called when references
 * came or went.
 */
export function enrolment(view, onchange) {
  const radio = (value, text, checked) =>
    h("label", { class: "choice" }, h("input", { type: "radio", name: "kind", value, checked }), ` ${text}`);
  const name = generatorInput({
    name: "generator",
    pattern: ".*\\S.*",
    title: "What made the images, not only blanks",
    placeholder: "for example SD-XL",
  });
  const nameField = h("label", {}, "Generator ", name);
  const source = h("input", {
    type: "text",
    name: "source",
    maxlength: 200,
    autocomplete: "off",
    placeholder: "upload",
  });
  const chosen = h("p", { class: "chosen", role: "status" }, "No images chosen yet.");
  const begin = h("button", { type: "submit", class: "primary", disabled: true }, "Enrol");
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Images sent" });
  const counter = h("span", { class: "counter" });
  const stop = h("button", { type: "button", onclick: () => (stopped = true) }, "Stop");
  const progress = h("div", { class: "progress", hidden: true }, bar, counter, stop);
  const outcome = h("div", { class: "outcome", "aria-live": "polite" });
  let files = [];
  let stopped = false;

  const zone = intake({
    view,
    title: "Drop a folder of images here",
    hint:
      "All of one generator, or all real. Twenty to fifty images make a difference; near copies of one image " +
      "do not. Thousands go in faster with lineup index add.",
    folder: true,
    onfiles: (dropped) => {
      const images = dropped.filter(looksLikeImage);
      const rest = dropped.length - images.length;
      files = images;
      const size = bytes(images.reduce((sum, file) => sum + file.size, 0));
      const left = rest ? `; ${plural(rest, "other file")} left out` : "";
      chosen.textContent = `${plural(images.length, "image")} chosen, ${size}${left}.`;
      begin.disabled = images.length === 0;
    },
  });

  const form = h(
    "form",
    {
      class: "enrol",
      onchange: () => {
        const real = new FormData(form).get("kind") === "real";
        nameField.hidden = real;
        name.required = !real;
      },
      onsubmit: async (event) => {
        event.preventDefault();
        const given = new FormData(form);
        const kind = given.get("kind");
        const batch = {
          label: kind,
          generator: kind === "fake" ? name.value.trim() : null,
          source: source.value.trim() || null,
        };
        await send(batch);
      },
    },
    zone,
    h(
      "div",
      { class: "fields" },
      h(
        "fieldset",
        {},
        h("legend", {}, "What are they?"),
        radio("fake", "Generated", true),
        radio("real", "Real photos", false),
      ),
      nameField,
      h("label", {}, "Source ", source, h("span", { class: "hint" }, " where they come from")),
    ),
    chosen,
    h("div", { class: "buttons" }, begin),
    progress,
    outcome,
  );

  async function send(batch) {
    const total = { added: 0, known: 0, embedded: 0, conflicts: [], rejected: [], reports: [], enrolments: [] };
    const waiting = batches(files);
    const all = files.length;
    let done = 0;
    stopped = false;
    begin.disabled = true;
    progress.hidden = false;
    outcome.replaceChildren();
    const tell = () => {
      bar.max = all;
      bar.value = done;
      counter.textContent = `${done} of ${all} images`;
    };
    tell();
    let trouble = null;
    while (waiting.length && !stopped && !trouble) {
      const part = waiting.shift();
      try {
        take(total, await add(part, batch));
        done += part.length;
      } catch (problem) {
        if (!(problem instanceof Problem)) throw problem;
        if (OF_A_FILE.has(problem.status) && part.length > 1) {
          const half = Math.ceil(part.length / 2);
          waiting.unshift(part.slice(0, half), part.slice(half));
        } else if (OF_A_FILE.has(problem.status)) {
          total.rejected.push({ file: part[0].name, reason: problem.message });
          done += 1;
        } else if (problem.status === 409) {
          if (problem.conflicts) total.conflicts.push(...problem.conflicts);
          else total.rejected.push(...part.map((file) => ({ file: file.name, reason: problem.message })));
          done += part.length;
        } else trouble = problem;
      }
      tell();
    }
    progress.hidden = true;
    ofOneFolder(total.enrolments);
    files = trouble || stopped ? files.slice(done) : [];
    begin.disabled = files.length === 0;
    chosen.textContent = files.length ? `${plural(files.length, "image")} not sent yet.` : "No images chosen yet.";
    report(total, batch, trouble);
    if (total.added) onchange();
  }

  function report(total, batch, trouble) {
    const counts = [total.added, total.known, total.embedded, total.conflicts.length, total.rejected.length];
    if (trouble && !counts.some(Boolean)) return outcome.replaceChildren(problemBox(trouble));
    const name = batch.generator ?? "real photos";
    const undoButton =
      total.added > 0 &&
      h(
        "button",
        {
          type: "button",
          onclick: async () => {
            try {
              const removed = await undo(total.enrolments, `${plural(total.added, "image")} of ${name}`);
              if (removed === null) return;
              outcome.replaceChildren(h("p", { class: "done" }, `Undone: ${plural(removed, "reference")} removed.`));
              onchange();
            } catch (problem) {
              outcome.append(problemBox(problem));
            }
          },
        },
        "Undo",
      );
    outcome.replaceChildren(
      ...[
        trouble && problemBox(trouble),
        h(
          "section",
          { class: "report" },
          h("h3", {}, total.added ? `Enrolled: ${name}` : "Nothing was enrolled"),
          reportWords(total),
          total.added > 0 && effectBars(total.reports, batch.generator),
          undoButton && h("div", { class: "buttons" }, undoButton),
        ),
      ].filter(Boolean),
    );
    announce(total.added ? `${plural(total.added, "image")} of ${name} enrolled` : "Nothing was enrolled");
  }

  return {
    form,
    clear: () => outcome.replaceChildren(),
  };
}

/** Files in parts that the service takes in one request. */
function batches(files) {
  const parts = [];
  let size = 0;
  for (const file of files) {
    if (!parts.length || parts.at(-1).length === MOST_FILES || size + file.size > MOST_BYTES) {
      parts.push([]);
      size = 0;
    }
    parts.at(-1).push(file);
    size += file.size;
  }
  return parts;
}

function add(files, { label, generator, source }) {
  const body = new FormData();
  for (const file of files) body.append("images", file, file.webkitRelativePath || file.name);
  body.append("label", label);
  if (generator) body.append("generator", generator);
  if (source) body.append("source", source);
  return ask("/v1/references", { method: "POST", body });
}

function take(total, report) {
  for (const field of ["added", "known", "embedded"]) total[field] += report[field];
  for (const field of ["conflicts", "rejected"]) total[field].push(...report[field]);
  if (report.enrolment !== null && report.enrolment !== undefined) total.enrolments.push(report.enrolment);
  if (report.added) total.reports.push(report);
}
