// Save, open and export: files that the browser writes and reads.

import { enlargements, pagePng, SIZES } from "./print.js";
import { readProject, writeProject } from "./project.js";

const $ = (selector) => document.querySelector(selector);

export class Files {
  constructor(history, desk, say) {
    Object.assign(this, { history, desk, say });
    $("#save").addEventListener("click", () => this.save());
    $("#open").addEventListener("click", () => $("#open-file").click());
    $("#open-file").addEventListener("change", ({ target }) => { this.open(target.files[0]); target.value = ""; });
    $("#export").addEventListener("click", () => this.showExport());
    $("#export-size").replaceChildren(...Object.entries(SIZES).map(([id, { name }]) => new Option(name, id)));
    $("#export-size").addEventListener("change", () => this._describe());
    $("#export-go").addEventListener("click", () => this.export());
    $("#export-dialog").addEventListener("click", ({ target }) => target.dataset.close !== undefined && $("#export-dialog").close());
  }

  get name() {
    return this.history.project.title.trim().replace(/[^\p{L}\p{N} _-]/gu, "").slice(0, 60) || "page";
  }

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

  showExport() {
    $("#export-size").value = this.history.project.layout === "strip" ? "web" : "print";
    this._describe();
    $("#export-dialog").showModal();
  }

  _describe() {
    const found = enlargements(this.history.project, (index) => this.desk.pictureOf(index), $("#export-size").value);
    const missing = this.desk.visible - found.length;
    const stale = found.filter(({ index }) => this.desk.stateOf(index) !== "current").length;
    const lines = found.map(({ index, times, dpi }) => `Panel ${index + 1}: enlarged ${times.toFixed(1)} times, effectively ${Math.round(dpi)} dpi`);
    if (found.length) lines.push("Pictures are enlarged by the browser's smooth filter; frames and lettering are sharp at any size.");
    if (missing) lines.push(`${missing} ${missing === 1 ? "panel has" : "panels have"} no picture yet.`);
    if (stale) lines.push(`${stale} ${stale === 1 ? "picture is" : "pictures are"} not current.`);
    $("#export-facts").replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  }

  async export() {
    const blob = await pagePng(this.history.project, (index) => this.desk.pictureOf(index), $("#export-size").value, this.desk.models[0].id);
    download(blob, `${this.name}.png`);
    $("#export-dialog").close();
  }
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
