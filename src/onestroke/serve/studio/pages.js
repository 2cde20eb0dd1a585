// The pages of the project, in small: turn to one, add, move and remove.

import { LAYOUTS } from "./layouts.js";
import { pageCanvas } from "./print.js";
import { MAX_PAGES, newPage } from "./project.js";

const $ = (selector) => document.querySelector(selector);
const WIDTH = 76; // pixels of a page in small
const DELAY_MS = 250; // after the last change: drawing in small must not slow typing

export class Pages {
  constructor(history, desk) {
    Object.assign(this, { history, desk, list: $("#pages") });
    $("#page-add").addEventListener("click", () => this.add());
    $("#page-remove").addEventListener("click", () => this.remove());
    $("#page-earlier").addEventListener("click", () => this.move(-1));
    $("#page-later").addEventListener("click", () => this.move(1));
    this.list.addEventListener("keydown", (event) => {
      const turn = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      history.turnTo(history.at + turn);
      this.list.children[history.at]?.querySelector("button").focus();
    });
    desk.addEventListener("change", () => this._paintSoon());
  }

  // A new page after this one, in its layout.
  add() {
    const { at, page } = this.history;
    if (this.history.project.pages.length >= MAX_PAGES) return;
    const added = newPage(page.layout);
    this.history.change("add page", (project) => ({ ...project, pages: project.pages.toSpliced(at + 1, 0, added) }), at + 1);
    this.history.settle();
  }

  remove() {
    const { at } = this.history;
    this.history.change("remove page", (project) => ({ ...project, pages: project.pages.toSpliced(at, 1) }), Math.max(0, at - 1));
    this.history.settle();
  }

  move(by) {
    const { at, page } = this.history;
    this.history.change("move page", (project) => ({ ...project, pages: project.pages.toSpliced(at, 1).toSpliced(at + by, 0, page) }), at + by);
    this.history.settle();
  }

  render() {
    const { at, project } = this.history;
    const { pages } = project;
    while (this.list.children.length > pages.length) this.list.lastChild.remove();
    while (this.list.children.length < pages.length) this.list.append(this._item(this.list.children.length));
    pages.forEach((page, index) => {
      const button = this.list.children[index].firstChild;
      button.setAttribute("aria-current", index === at ? "page" : "false");
      button.setAttribute("aria-label", `Page ${index + 1} of ${pages.length}`);
      button.firstChild.style.aspectRatio = `1 / ${LAYOUTS[page.layout].ratio}`;
    });
    $("#page-add").disabled = pages.length >= MAX_PAGES;
    $("#page-remove").disabled = pages.length < 2;
    $("#page-earlier").disabled = at === 0;
    $("#page-later").disabled = at === pages.length - 1;
    this._paintSoon();
  }

  _item(index) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const number = document.createElement("span");
    number.textContent = index + 1;
    button.append(document.createElement("canvas"), number);
    button.addEventListener("click", () => this.history.turnTo(index));
    item.append(button);
    return item;
  }

  _paintSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.paint(), DELAY_MS);
  }

  paint() {
    const { project } = this.history;
    const density = Math.min(2, window.devicePixelRatio || 1);
    project.pages.forEach((page, index) => {
      const canvas = this.list.children[index]?.querySelector("canvas");
      if (!canvas) return;
      const painted = pageCanvas(project, page, (panel, of) => this.desk.pictureOf(panel, of), WIDTH * density);
      Object.assign(canvas, { width: painted.width, height: painted.height });
      canvas.getContext("2d").drawImage(painted, 0, 0);
    });
  }
}
