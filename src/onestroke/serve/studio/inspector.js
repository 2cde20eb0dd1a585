// What is known and set of the chosen panel, and of the chosen balloon.

import { Compare } from "./compare.js";
import { LoraView } from "./lora.js";
import { STEPS } from "./project.js";
import { spoken } from "./sheet.js";
import { Sketch } from "./sketch.js";

const $ = (selector) => document.querySelector(selector);
const NUM_VARIANTS = 8;
const STATES = { current: "Current", drawing: "Drawing…", offline: "Waiting for the server", fault: "Not drawn", empty: "Empty" };
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

export class Inspector {
  constructor(history, desk, page, balloons, models, say) {
    Object.assign(this, { history, desk, page, balloons, models, say, seeds: [] });
    this.sketch = new Sketch($("#sketch-dialog"));
    this.compare = new Compare($("#compare-dialog"), history, desk, models);
    this.lora = new LoraView(models, (name, lora) => this._set(name, { lora }), () => this.panel);
    this._wirePanel();
    this._wireSketch();
    $("#variants").addEventListener("click", () => this.variants());
    $("#variant-grid").addEventListener("keydown", (event) => this._variantKey(event));
    desk.addEventListener("picture", ({ detail }) => {
      if (detail.variant !== undefined) this.renderVariants();
      if (this.sketch.dialog.open && detail.index === this.page.selected) this.sketch.show(this.desk.pictureOf(detail.index).bitmap);
    });
    page.addEventListener("select", () => { this.seeds = []; });
    history.addEventListener("turn", () => { this.seeds = []; });
    $("#compare").hidden = models.length < 2;
  }

  get panel() {
    return this.history.page.panels[this.page.selected];
  }

  _set(name, fields) {
    this.history.panel(this.page.selected, name, fields);
  }

  _wirePanel() {
    $("#prompt").addEventListener("input", ({ target }) => {
      const fields = { prompt: target.value.slice(0, 2000) };
      if (!this.panel.locked) fields.seed = newSeed();
      this._set("prompt", fields);
    });
    $("#seed").addEventListener("change", ({ target }) => {
      const seed = Math.round(Number(target.value));
      if (target.value.trim() !== "" && seed >= 0 && seed < 2 ** 32) this._set("seed", { seed });
      else target.value = this.panel.seed;
    });
    $("#dice").addEventListener("click", () => this._set("seed", { seed: newSeed() }));
    $("#lock").addEventListener("click", () => this._set("lock", { locked: !this.panel.locked }));
    for (const steps of STEPS) $(`#steps-${steps}`).addEventListener("change", () => this._set("steps", { steps, model: "" }));
    for (const fit of ["whole", "fill"]) $(`#fit-${fit}`).addEventListener("change", () => this._set("fit", { fit }));
    $("#student").addEventListener("click", () => this._set("model", { model: "", steps: 1 }));
    $("#compare").addEventListener("click", () => this.compare.open(this.page.selected));
  }

  _wireSketch() {
    let before = null;
    $("#sketch").addEventListener("click", async () => {
      before = this.panel.sketch;
      const bitmap = this.desk.pictureOf(this.page.selected)?.bitmap;
      await this.sketch.open(before, bitmap);
      if (bitmap) this.sketch.show(bitmap);
    });
    this.sketch.addEventListener("change", ({ detail }) => this._set("sketch", { sketch: detail }));
    this.sketch.addEventListener("keep", ({ detail }) => { this._set("sketch", { sketch: detail }); this.history.settle(); });
    this.sketch.addEventListener("remove", () => { this._set("sketch", { sketch: null }); this.history.settle(); });
    this.sketch.addEventListener("fault", ({ detail }) => this.say(detail));
  }

  render() {
    const { panel } = this;
    const index = this.page.selected;
    $("#panel-name").textContent = `Panel ${index + 1}`;
    if ($("#prompt").value !== panel.prompt) $("#prompt").value = panel.prompt;
    const told = spoken(panel.prompt, this.history.project.sheet);
    $("#spoken").hidden = !told.prompt || (told.prompt === panel.prompt.trim() && !told.unknown.length);
    $("#spoken").textContent = `The model reads: ${told.prompt}${told.unknown.length ? ` (not on the character sheet: ${told.unknown.join(", ")})` : ""}`;
    $("#prompt").placeholder = `What does panel ${index + 1} show?`;
    $("#seed").value = panel.seed;
    $("#lock").setAttribute("aria-pressed", String(panel.locked));
    $("#lock").textContent = panel.locked ? "Locked" : "Unlocked";
    $("#lock").title = panel.locked ? "The seed stays while you write" : "Every change of words takes a new seed";
    for (const steps of STEPS) $(`#steps-${steps}`).checked = panel.steps === steps && !panel.model;
    $(`#fit-${panel.fit}`).checked = true;
    this.lora.render();
    $("#kept-teacher").hidden = !panel.model;
    $("#kept-teacher-name").textContent = panel.model ? `Drawn by ${panel.model} in ${panel.steps} steps.` : "";
    $("#sketch").textContent = panel.sketch ? "Edit sketch…" : "Sketch…";
    $("#sketch").disabled = $("#variants").disabled = $("#compare").disabled = !panel.prompt.trim();
    this.renderPicture();
    this.renderVariants();
    this.renderBalloon();
  }

  renderPicture() {
    const index = this.page.selected;
    const state = this.desk.stateOf(index);
    $("#save-picture").disabled = !this.desk.pictureOf(index);
    const chip = $("#panel-state");
    if (chip.textContent !== STATES[state]) chip.textContent = STATES[state];
    chip.dataset.state = state;
    const notices = this.desk.pictureOf(index)?.header?.notices ?? [];
    const lines = state === "fault" ? [this.desk.faultOf(index)] : state === "current" ? notices.map(({ message }) => message) : null;
    if (lines) $("#notices").replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
    else if (state === "empty") $("#notices").replaceChildren();
  }

  // Draw the panel with new seeds, to choose from.
  variants() {
    if (!this.panel.prompt.trim()) return;
    this.seeds = Array.from({ length: NUM_VARIANTS }, newSeed);
    this.seeds.forEach((seed, variant) => {
      const panel = { ...this.panel, seed };
      this.desk.draw(`variant ${variant + 1}`, panel, { key: this.desk.keyOfPanel(panel), variant });
    });
    this.renderVariants();
    $("#variant-grid").querySelector("button")?.focus();
  }

  renderVariants() {
    const grid = $("#variant-grid");
    const focused = [...grid.children].indexOf(document.activeElement);
    $("#variant-area").hidden = this.seeds.length === 0;
    grid.replaceChildren(...this.seeds.map((seed, variant) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-label", `Keep variant ${variant + 1}, seed ${seed}`);
      button.setAttribute("aria-pressed", String(seed === this.panel.seed));
      const picture = this.desk.pictures.get(this.desk.keyOfPanel({ ...this.panel, seed }));
      if (picture) {
        const canvas = document.createElement("canvas");
        canvas.width = picture.bitmap.width;
        canvas.height = picture.bitmap.height;
        canvas.getContext("2d").drawImage(picture.bitmap, 0, 0);
        button.append(canvas);
      }
      const digit = document.createElement("kbd");
      digit.textContent = variant + 1;
      button.append(digit);
      button.addEventListener("click", () => this._keep(variant));
      return button;
    }));
    if (focused >= 0) grid.children[focused]?.focus({ preventScroll: true });
  }

  _keep(variant) {
    this.history.settle();
    this._set("keep variant", { seed: this.seeds[variant] });
    this.history.settle();
  }

  _variantKey(event) {
    const buttons = [...$("#variant-grid").children];
    const at = buttons.indexOf(document.activeElement);
    const turn = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 4, ArrowUp: -4 }[event.key];
    if (turn && at >= 0) buttons[(at + turn + buttons.length) % buttons.length].focus();
    else if (event.key >= "1" && event.key <= String(buttons.length)) this._keep(Number(event.key) - 1);
    else return;
    event.preventDefault();
  }

  renderBalloon() {
    const balloon = this.history.page.balloons.find(({ id }) => id === this.balloons.selected);
    $("#balloon-area").hidden = !balloon;
    if (!balloon) return;
    if ($("#balloon-text").value !== balloon.text) $("#balloon-text").value = balloon.text;
    $("#balloon-size").value = balloon.size;
  }
}
