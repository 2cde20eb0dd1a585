// Which picture each panel wants, which it has, and what is asked of the server in between.

import { framesOf } from "./layouts.js";
import { addressOf, blobOf, keyOf, Pictures } from "./pictures.js";
import { spoken } from "./sheet.js";

const AHEAD = 8; // pictures of pages out of sight that are asked for at once

export class Desk extends EventTarget {
  constructor(history, live, models) {
    super();
    this.history = history;
    this.live = live;
    this.models = models;
    this.pictures = new Pictures();
    this.shown = new Map(); // place of a panel -> key of the picture that it shows
    this.newest = new Map(); // place of a panel -> id of the newest answer that it took
    this.faults = new Map(); // key -> message
    live.addEventListener("picture", ({ detail }) => this._take(detail));
    live.addEventListener("fault", ({ detail }) => {
      if (!detail.retry_after) this.faults.set(detail.context?.key, detail.message);
      this.dispatchEvent(new Event("change"));
    });
  }

  // Panels of a page in sight.
  get visible() {
    return this.numPanels(this.history.page);
  }

  numPanels(page) {
    return framesOf(page.layout, this.history.project.direction).length;
  }

  // The panel with its prompt as the model reads it.
  spoken(panel) {
    return { ...panel, prompt: spoken(panel.prompt, this.history.project.sheet).prompt };
  }

  keyOfPanel(panel) {
    return keyOf(this.spoken(panel), this.models[0].id);
  }

  keyOf(index, page = this.history.page) {
    return this.keyOfPanel(page.panels[index]);
  }

  // "empty" | "current" | "drawing" | "fault" | "offline"
  stateOf(index, page = this.history.page) {
    if (!this.spoken(page.panels[index]).prompt) return "empty";
    const key = this.keyOf(index, page);
    if (this.pictures.has(key)) return "current";
    if (this.faults.has(key)) return "fault";
    return this.live.state === "open" ? "drawing" : "offline";
  }

  faultOf(index) {
    return this.faults.get(this.keyOf(index)) ?? "";
  }

  // The picture that the panel shows: its own, or the last one that it had.
  pictureOf(index, page = this.history.page) {
    if (!this.spoken(page.panels[index]).prompt) return undefined;
    const own = this.pictures.get(this.keyOf(index, page));
    return own ?? this.pictures.get(this.shown.get(placeOf(page, index)));
  }

  // Ask for what the panels on the page lack.
  redraw() {
    const { page } = this.history;
    for (let index = 0; index < this.visible; index++) {
      const name = `panel ${index + 1}`;
      const key = this.keyOf(index);
      if (this.stateOf(index) === "current") {
        this.shown.set(placeOf(page, index), key);
        this.live.cancel(name);
      } else if (this.stateOf(index) === "empty") {
        this.live.cancel(name);
      } else if (!this.faults.has(key) && this.live.wanted.get(name)?.context.key !== key) {
        this.draw(name, page.panels[index], { key, index, place: placeOf(page, index) });
      }
    }
    this.dispatchEvent(new Event("change"));
  }

  // Ask for the next pictures that pages out of sight lack; how many are lacking.
  complete() {
    let missing = 0;
    for (const page of this.history.project.pages) {
      if (page === this.history.page) continue;
      for (let index = 0; index < this.numPanels(page); index++) {
        if (!["drawing", "offline"].includes(this.stateOf(index, page))) continue;
        const [key, place] = [this.keyOf(index, page), placeOf(page, index)];
        if (missing++ < AHEAD && this.live.wanted.get(place)?.context.key !== key) this.draw(place, page.panels[index], { key, place });
      }
    }
    return missing;
  }

  // Ask for one picture under a name of its own: variants, comparisons.
  draw(name, panel, context) {
    const order = { prompt: this.spoken(panel).prompt, seed: panel.seed, steps: panel.steps };
    if (panel.model) order.model = panel.model;
    if (panel.lora) Object.assign(order, { lora: panel.lora.name, lora_scale: panel.lora.scale });
    if (panel.sketch) {
      Object.assign(order, { image: panel.sketch.image, strength: panel.sketch.strength });
      if (panel.sketch.mask) order.mask = panel.sketch.mask;
    }
    this.live.ask(name, order, { at: performance.now(), ...context });
  }

  async _take({ header, blob, context }) {
    if (!context) return;
    await this.pictures.add(context.key, blob, header);
    // Pictures decode one after another, but never let an older one take a newer one's place.
    if (context.place && header.id >= (this.newest.get(context.place) ?? 0)) {
      this.newest.set(context.place, header.id);
      this.shown.set(context.place, context.key);
      if (context.index !== undefined) this.lastTimes = { timings: header.timings, trip: performance.now() - context.at };
    }
    this.dispatchEvent(new CustomEvent("picture", { detail: context }));
    this.dispatchEvent(new Event("change"));
  }

  // The current pictures of all pages, for a project file: Map of key to data address.
  async shownPictures() {
    const found = new Map();
    for (const page of this.history.project.pages) {
      for (let index = 0; index < this.numPanels(page); index++) {
        const key = this.keyOf(index, page);
        const picture = this.pictures.get(key);
        if (picture) found.set(key, (picture.address ??= await addressOf(picture.blob)));
      }
    }
    return found;
  }

  // Take pictures from a project file. One that cannot be decoded is drawn again.
  async restore(pictures) {
    for (const [key, address] of pictures) {
      const blob = blobOf(address);
      await this.pictures.add(key, blob, null).catch(() => {});
    }
  }
}

const placeOf = (page, index) => `${page.id}/${index}`;
