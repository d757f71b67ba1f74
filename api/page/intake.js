/** Where images come in: chosen, dropped, pasted, or a whole folder at once. */

import { h, icon } from "./dom.js";

const IMAGES = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf])$/i;

/** Whether a file looks like an image. Used for folders only: a file chosen by hand is sent, and the service says. */
export function looksLikeImage(file) {
  return file.type.startsWith("image/") || IMAGES.test(file.name);
}

/**
 * A place to drop images on, with a button that opens the file chooser.
 *
 * `onfiles` gets an array of files. `folder` lets a whole folder be chosen. `view` is the section that owns it: while
 * that is shown, images may be dropped anywhere on the page and pasted.
 */
export function intake({ view, title, hint, onfiles, multiple = true, folder = false }) {
  const take = (files) => {
    const chosen = [...files];
    if (chosen.length) onfiles(multiple ? chosen : chosen.slice(0, 1));
  };
  const chooser = (label, attributes, className) => {
    const input = h("input", {
      type: "file",
      class: "unseen",
      ...attributes,
      onchange: () => {
        take([...input.files].sort(byPath));
        input.value = ""; // so that the same file may be chosen again
      },
    });
    return h("label", { class: `button ${className}` }, label, input);
  };
  const zone = h(
    "div",
    { class: "intake" },
    icon("drop"),
    h("p", { class: "title" }, title),
    h(
      "div",
      { class: "buttons" },
      chooser(multiple ? "Choose images" : "Choose an image", { accept: "image/*", multiple }, "primary"),
      folder ? chooser("Choose a folder", { webkitdirectory: true }, "") : null,
    ),
    h("p", { class: "hint" }, hint),
  );

  let inside = 0; // a drag enters children before it leaves their parent
  const here = (event) =>
    !view.hidden && !document.querySelector("dialog[open]") && [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = () => zone.classList.toggle("over", inside > 0);
  document.addEventListener("dragenter", (event) => {
    if (here(event)) {
      event.preventDefault();
      inside += 1;
      mark();
    }
  });
  document.addEventListener("dragleave", (event) => {
    if (here(event)) {
      inside = Math.max(0, inside - 1);
      mark();
    }
  });
  document.addEventListener("dragover", (event) => {
    if (here(event)) event.preventDefault();
  });
  document.addEventListener("drop", async (event) => {
    if (!here(event)) return;
    event.preventDefault();
    inside = 0;
    mark();
    take(await droppedFiles(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    if (view.hidden || /^(input|textarea|select)$/i.test(event.target.tagName ?? "")) return;
    const pasted = [...(event.clipboardData?.files ?? [])].filter(looksLikeImage);
    if (pasted.length) {
      event.preventDefault();
      take(pasted);
    }
  });
  return zone;
}

const names = new Intl.Collator("en", { numeric: true });

/** The files of a folder come in any order; others, which have no path, stay as they are. */
const byPath = (one, other) => names.compare(one.webkitRelativePath, other.webkitRelativePath);

/** All files of a drop; of folders, those inside that look like images. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else for (const child of await children(entry)) await walk(child);
  };
  for (const entry of entries) await walk(entry);
  return files.filter(looksLikeImage);
}

async function children(directory) {
  const reader = directory.createReader();
  const all = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return all.sort((one, other) => names.compare(one.name, other.name));
    all.push(...some);
  }
}
