// Which picture each panel wants, which it has, and what is asked of the server in between.

import { framesOf } from "./layouts.js";
import { addressOf, blobOf, keyOf, Pictures } from "./pictures.js";

export class Desk extends EventTarget {
  constructor(history, live, models) {
    super();
    this.history = history;
    this.live = live;
    this.models = models;
    this.pictures = new Pictures();
    this.shown = new Map(); // panel index -> key of the picture that it shows
    this.faults = new Map(); // key -> message
    live.addEventListener("picture", ({ detail }) => this._take(detail));
    live.addEventListener("fault", ({ detail }) => {
      if (!detail.retry_after) this.faults.set(detail.context?.key, detail.message);
      this.dispatchEvent(new Event("change"));
    });
  }

  get visible() {
    return framesOf(this.history.project.layout, this.history.project.direction).length;
  }

  keyOf(index) {
    return keyOf(this.history.project.panels[index], this.models[0].id);
  }

  // "empty" | "current" | "drawing" | "fault" | "offline"
  stateOf(index) {
    if (!this.history.project.panels[index].prompt.trim()) return "empty";
    const key = this.keyOf(index);
    if (this.pictures.has(key)) return "current";
    if (this.faults.has(key)) return "fault";
    return this.live.state === "open" ? "drawing" : "offline";
  }

  faultOf(index) {
    return this.faults.get(this.keyOf(index)) ?? "";
  }

  // The picture that the panel shows: its own, or the last one that it had.
  pictureOf(index) {
    if (!this.history.project.panels[index].prompt.trim()) return undefined;
    const own = this.pictures.get(this.keyOf(index));
    return own ?? this.pictures.get(this.shown.get(index));
  }

  // Ask for what the panels on the page lack.
  redraw() {
    for (let index = 0; index < this.visible; index++) {
      const name = `panel ${index + 1}`;
      const key = this.keyOf(index);
      if (this.stateOf(index) === "current") {
        this.shown.set(index, key);
        this.live.cancel(name);
      } else if (this.stateOf(index) === "empty") {
        this.live.cancel(name);
      } else if (!this.faults.has(key) && this.live.wanted.get(name)?.context.key !== key) {
        this.draw(name, this.history.project.panels[index], { key, index });
      }
    }
    this.dispatchEvent(new Event("change"));
  }

  // Ask for one picture under a name of its own: variants, comparisons.
  draw(name, panel, context) {
    const order = { prompt: panel.prompt.trim(), seed: panel.seed, steps: panel.steps };
    if (panel.model) order.model = panel.model;
    if (panel.sketch) {
      Object.assign(order, { image: panel.sketch.image, strength: panel.sketch.strength });
      if (panel.sketch.mask) order.mask = panel.sketch.mask;
    }
    this.live.ask(name, order, { at: performance.now(), ...context });
  }

  async _take({ header, blob, context }) {
    if (!context) return;
    await this.pictures.add(context.key, blob, header);
    if (context.index !== undefined) {
      // Pictures decode one after another, but never let an older one take a newer one's place.
      const newest = this.newest ?? (this.newest = new Map());
      if (header.id >= (newest.get(context.index) ?? 0)) {
        newest.set(context.index, header.id);
        this.shown.set(context.index, context.key);
        this.lastTimes = { timings: header.timings, trip: performance.now() - context.at };
      }
    }
    this.dispatchEvent(new CustomEvent("picture", { detail: context }));
    this.dispatchEvent(new Event("change"));
  }

  // The pictures on the page, for a project file: Map of key to data address.
  async shownPictures() {
    const found = new Map();
    for (let index = 0; index < this.visible; index++) {
      const picture = this.pictures.get(this.keyOf(index));
      if (picture) found.set(this.keyOf(index), await addressOf(picture.blob));
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
