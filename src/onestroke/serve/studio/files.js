// Save, open and export: files that the browser writes and reads.

import { bookCbz } from "./cbz.js";
import { FILTERS } from "./enlarge.js";
import { bookPdf } from "./pdf.js";
import { drawnFrom, pagePng, SIZES } from "./print.js";
import { readProject, writeProject } from "./project.js";

const $ = (selector) => document.querySelector(selector);

export class Files {
  constructor(history, desk, say) {
    Object.assign(this, { history, desk, say });
    this.dialog = $("#export-dialog");
    $("#save").addEventListener("click", () => this.save());
    $("#open").addEventListener("click", () => $("#open-file").click());
    $("#open-file").addEventListener("change", ({ target }) => { this.open(target.files[0]); target.value = ""; });
    $("#export").addEventListener("click", () => this.showExport());
    for (const [id, choices] of [["#export-size", SIZES], ["#export-filter", FILTERS]]) {
      $(id).replaceChildren(...Object.entries(choices).map(([value, { name }]) => new Option(name, value)));
    }
    this.dialog.addEventListener("change", () => this._describe());
    $("#export-go").addEventListener("click", () => this.export());
    this.dialog.addEventListener("click", ({ target }) => target.dataset.close !== undefined && this.dialog.close());
    desk.addEventListener("change", () => this.dialog.open && !this.busy && this._describe());
  }

  get name() {
    return this.history.project.title.trim().replace(/[^\p{L}\p{N} _-]/gu, "").slice(0, 60) || "page";
  }

  get kind() {
    return document.querySelector("[name=export-kind]:checked").id.replace("export-", "");
  }

  get options() {
    return { size: this.kind === "pdf" ? "print" : $("#export-size").value, filter: $("#export-filter").value };
  }

  pictureOf = (index, page) => this.desk.pictureOf(index, page);

  async save() {
    const content = writeProject(this.history.project, await this.desk.shownPictures());
    download(new Blob([content], { type: "application/json" }), `${this.name}.onestroke.json`);
  }

  async open(file) {
    if (!file) return;
    if (file.size > 200_000_000) return this.say("This file is too large for a project.");
    try {
      const { project, pictures } = readProject(await file.text());
      await this.desk.restore(pictures);
      this.history.open(project);
      this.say("Opened. Undo brings back what was here before.");
    } catch (error) {
      this.say(error.message);
    }
  }

  // A panel's picture as the server wrote it, what it was drawn from inside.
  savePicture(index) {
    const picture = this.desk.pictureOf(index);
    if (picture) download(picture.blob, `${this.name} ${this.history.at + 1}-${index + 1}.${picture.blob.type.split("/")[1]}`);
  }

  showExport() {
    $("#export-size").value = this.history.page.layout === "strip" ? "web" : "print";
    this._describe();
    this.dialog.showModal();
  }

  // The pages that are exported.
  get pages() {
    return this.kind === "png" ? [this.history.page] : this.history.project.pages;
  }

  _describe() {
    const { kind, options, pages } = this;
    const { project } = this.history;
    const missing = kind === "png" ? 0 : this.desk.complete();
    const found = pages.flatMap((page) => {
      const number = project.pages.indexOf(page) + 1;
      return drawnFrom(project, page, this.pictureOf, options, this.desk.models[0].id).map((entry) => ({ ...entry, page, number }));
    });
    const shown = found.filter(({ enlarged }) => enlarged);
    const place = ({ number, panel }) => (pages.length > 1 ? `Page ${number}, panel ${panel}` : `Panel ${panel}`);
    const lines = shown.map((entry) => `${place(entry)}: ${entry.enlarged.times.toFixed(1)} times, effectively ${entry.enlarged.effective_dpi} dpi`);
    const stale = shown.filter(({ panel, page }) => this.desk.stateOf(panel - 1, page) !== "current").length;
    const empty = found.length - shown.length - missing;
    const facts = shown.length ? [`Enlarged by: ${FILTERS[options.filter].told}. Frames are sharp at any size${kind === "pdf" ? ", and the lettering is text in its own fonts" : ""}.`] : [];
    if (missing) facts.push(`${missing} ${missing === 1 ? "picture is" : "pictures are"} still being drawn.`);
    if (empty) facts.push(`${empty} ${empty === 1 ? "panel has" : "panels have"} no picture.`);
    if (stale) facts.push(`${stale} ${stale === 1 ? "picture is" : "pictures are"} not current.`);
    $("#export-size").disabled = kind === "pdf";
    if (kind === "pdf") $("#export-size").value = "print";
    $("#export-go").textContent = { png: "Export PNG", pdf: "Export PDF", cbz: "Export CBZ" }[kind];
    $("#export-go").disabled = missing > 0;
    const items = (list) => list.map((line) => Object.assign(document.createElement("li"), { textContent: line }));
    $("#export-facts").replaceChildren(...items(facts));
    $("#export-panels").replaceChildren(...items(lines));
  }

  async export() {
    const { kind, options, name } = this;
    const { project, page } = this.history;
    const model = this.desk.models[0].id;
    const button = $("#export-go");
    const told = (number) => { button.textContent = `Page ${number} of ${project.pages.length}…`; };
    this.busy = button.disabled = true;
    try {
      if (kind === "png") download((await pagePng(project, page, this.pictureOf, options, model)).blob, `${name}.png`);
      else if (kind === "pdf") download(await bookPdf(project, this.pictureOf, options, model, told), `${name}.pdf`);
      else download(await bookCbz(project, this.pictureOf, options, model, told), `${name}.cbz`);
      this.dialog.close();
    } catch (error) {
      this.say(`Not exported: ${error.message}.`);
    } finally {
      this.busy = button.disabled = false;
    }
  }
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
