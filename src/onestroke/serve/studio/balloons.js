// The lettering over the page: choose, drag, turn tails, and the same by keyboard.

import { balloonElement, svg } from "./lettering.js";
import { PAGE_WIDTH, pageHeight } from "./layouts.js";

const NUDGE = 6; // page units
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Balloons extends EventTarget {
  constructor(overlay, history) {
    super();
    this.overlay = overlay;
    this.history = history;
    this.selected = null;
    overlay.addEventListener("keydown", (event) => this._key(event));
  }

  select(id) {
    if (this.selected === id) return;
    this.selected = id;
    this.render();
    this.dispatchEvent(new Event("select"));
  }

  render() {
    const { layout, balloons } = this.history.page;
    const focused = document.activeElement?.dataset?.balloon;
    this.overlay.setAttribute("viewBox", `0 0 ${PAGE_WIDTH} ${pageHeight(layout)}`);
    this.overlay.replaceChildren(...balloons.map((balloon) => this._element(balloon)));
    if (focused) this.overlay.querySelector(`[data-balloon="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  _element(balloon) {
    const { group, box } = balloonElement(balloon);
    const chosen = balloon.id === this.selected;
    const outer = svg("g", { class: chosen ? "balloon chosen" : "balloon", tabindex: 0, role: "button", "data-balloon": balloon.id,
                             "aria-label": `${balloon.kind}: ${balloon.text}` }, group);
    outer.addEventListener("focus", () => this.select(balloon.id));
    this._drag(group, balloon, (start, dx, dy) => ({
      x: start.x + dx, y: start.y + dy, tail: start.tail && { x: start.tail.x + dx, y: start.tail.y + dy },
    }));
    if (!chosen) return outer;
    const [x, y, width, height] = box;
    outer.append(svg("rect", { class: "frame", x: x - 6, y: y - 6, width: width + 12, height: height + 12, rx: 6 }));
    const corner = svg("circle", { class: "handle", cx: x + width + 6, cy: y + height / 2, r: 10, "data-handle": "width" });
    this._drag(corner, balloon, (start, dx) => ({ width: Math.min(1000, Math.max(40, start.width + 2 * dx)) }));
    outer.append(corner);
    if (balloon.tail) {
      const tip = svg("circle", { class: "handle tail", cx: balloon.tail.x, cy: balloon.tail.y, r: 11, "data-handle": "tail" });
      this._drag(tip, balloon, (start, dx, dy) => ({ tail: { x: start.tail.x + dx, y: start.tail.y + dy } }));
      outer.append(tip);
    }
    return outer;
  }

  _drag(element, balloon, fieldsAt) {
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      event.stopPropagation();
      const scale = PAGE_WIDTH / this.overlay.getBoundingClientRect().width;
      const from = [event.clientX, event.clientY];
      this.select(balloon.id);
      this.history.settle();
      const move = (at) => {
        const fields = fieldsAt(balloon, (at.clientX - from[0]) * scale, (at.clientY - from[1]) * scale);
        this.history.balloon(balloon.id, "move", fields);
      };
      const end = () => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", end);
        window.removeEventListener("pointercancel", end);
        this.history.settle();
        this.overlay.querySelector(`[data-balloon="${CSS.escape(balloon.id)}"]`)?.focus({ preventScroll: true });
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", end);
      window.addEventListener("pointercancel", end);
    });
  }

  _key(event) {
    const balloon = this.history.page.balloons.find(({ id }) => id === this.selected);
    if (!balloon) return;
    const arrow = ARROWS[event.key];
    if (arrow) {
      const [dx, dy] = arrow.map((direction) => direction * NUDGE * (event.shiftKey ? 5 : 1));
      const tail = balloon.tail && { x: balloon.tail.x + dx, y: balloon.tail.y + dy };
      this.history.balloon(balloon.id, "move", event.altKey && tail ? { tail } : { x: balloon.x + dx, y: balloon.y + dy, tail });
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.remove();
    } else if (event.key === "Enter") {
      this.dispatchEvent(new Event("write"));
    } else if (event.key === "Escape") {
      this.select(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  remove() {
    const id = this.selected;
    this.select(null);
    this.history.changePage("delete balloon", (page) => ({ ...page, balloons: page.balloons.filter((balloon) => balloon.id !== id) }));
  }
}
