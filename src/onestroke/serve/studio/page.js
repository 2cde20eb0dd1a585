// The page: frames, pictures, and which panel is chosen.

import { framesOf, LAYOUTS, PAGE_WIDTH, pageHeight } from "./layouts.js";
import { paintPicture } from "./pictures.js";

const LABELS = { current: "", drawing: "drawing…", offline: "waiting for the server", fault: "not drawn", empty: "" };

export class PageView extends EventTarget {
  constructor(element, history, desk) {
    super();
    Object.assign(this, { element, history, desk, selected: 0, panels: [] });
    new ResizeObserver(() => this.paint()).observe(element);
  }

  select(index) {
    this.selected = index;
    this.dispatchEvent(new Event("select"));
  }

  render() {
    const { layout, panels } = this.history.page;
    const { direction } = this.history.project;
    const frames = framesOf(layout, direction);
    this.selected = Math.min(this.selected, frames.length - 1);
    this.element.style.aspectRatio = `1 / ${LAYOUTS[layout].ratio}`;
    this.element.dataset.layout = layout;
    while (this.panels.length > frames.length) this.panels.pop().remove();
    while (this.panels.length < frames.length) this.panels.push(this._newPanel(this.panels.length));
    frames.forEach(([x, y, width, height], index) => {
      const panel = this.panels[index];
      const tall = pageHeight(layout);
      Object.assign(panel.style, { left: `${(100 * x) / PAGE_WIDTH}%`, top: `${(100 * y) / tall}%`,
                                   width: `${(100 * width) / PAGE_WIDTH}%`, height: `${(100 * height) / tall}%` });
      panel.setAttribute("aria-pressed", String(index === this.selected));
      panel.setAttribute("aria-label", `Panel ${index + 1}: ${panels[index].prompt || "empty"}`);
    });
    this.paint();
  }

  _newPanel(index) {
    const panel = document.createElement("button");
    panel.type = "button";
    panel.className = "panel";
    const canvas = document.createElement("canvas");
    const state = document.createElement("span");
    state.className = "state";
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = index + 1;
    panel.append(canvas, number, state);
    panel.addEventListener("click", () => this.select(index));
    panel.addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      const next = (index + turn + this.panels.length) % this.panels.length;
      this.select(next);
      this.panels[next].focus();
    });
    this.element.insertBefore(panel, this.element.querySelector("#lettering"));
    return panel;
  }

  // Pictures and states alone; frames stay.
  paint() {
    this.panels.forEach((panel, index) => {
      const state = this.desk.stateOf(index);
      panel.dataset.state = state;
      panel.lastChild.textContent = LABELS[state];
      const canvas = panel.firstChild;
      const density = Math.min(2, window.devicePixelRatio || 1);
      const [width, height] = [Math.round(panel.clientWidth * density), Math.round(panel.clientHeight * density)];
      const picture = this.desk.pictureOf(index);
      const shown = JSON.stringify([width, height, picture && this.desk.keyOf(index), state, this.history.page.panels[index].fit]);
      if (canvas.dataset.shown === shown && canvas.picture === picture) return;
      Object.assign(canvas, { width, height, picture });
      canvas.dataset.shown = shown;
      if (picture) paintPicture(canvas.getContext("2d"), picture.bitmap, [0, 0, width, height], this.history.page.panels[index].fit);
    });
  }
}
