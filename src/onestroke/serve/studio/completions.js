// Completions of the prompt from the phrases that the model was trained on, and from the names on the character sheet.

const MOST = 6;

export class Completions {
  constructor(input, list, onChoose) {
    Object.assign(this, { input, list, onChoose, phrases: [], names: () => [], shown: [], active: -1 });
    input.addEventListener("input", () => this._update());
    input.addEventListener("blur", () => setTimeout(() => document.activeElement === input || this.close(), 120));
    input.addEventListener("keydown", (event) => this._key(event));
    list.addEventListener("mousedown", (event) => {
      event.preventDefault();
      const item = event.target.closest("li");
      if (item) this._choose(Number(item.dataset.number));
    });
  }

  _update() {
    const before = this.input.value.slice(0, this.input.selectionStart);
    const words = [...before.matchAll(/\S+/g)];
    this.shown = [];
    // The longest run of last words that begins a phrase; or else the last word, anywhere in a phrase.
    for (let count = Math.min(4, words.length); count > 0 && !this.shown.length && !/\s$/.test(before); count--) {
      this.start = words.at(-count).index;
      const typed = before.slice(this.start).toLowerCase();
      this.shown = typed.length < 2 && typed !== "@" ? [] : this._matches(typed, count === 1);
    }
    this.active = -1;
    this._render();
  }

  _matches(typed, anywhere) {
    if (typed.startsWith("@")) return this.names().filter((name) => name.toLowerCase().startsWith(typed) && name.toLowerCase() !== typed).slice(0, MOST);
    const begin = this.phrases.filter((phrase) => phrase.startsWith(typed) && phrase !== typed);
    const within = anywhere ? this.phrases.filter((phrase) => phrase.includes(` ${typed}`)) : [];
    return [...new Set([...begin, ...within])].slice(0, MOST);
  }

  _render() {
    const open = this.shown.length > 0;
    this.list.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open));
    this.list.replaceChildren(...this.shown.map((phrase, number) => {
      const item = document.createElement("li");
      Object.assign(item, { id: `completion-${number}`, role: "option", textContent: phrase });
      item.dataset.number = number;
      item.setAttribute("aria-selected", String(number === this.active));
      return item;
    }));
    if (this.active >= 0) this.input.setAttribute("aria-activedescendant", `completion-${this.active}`);
    else this.input.removeAttribute("aria-activedescendant");
  }

  _key(event) {
    if (!this.shown.length) return;
    const turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (turn) {
      this.active = (this.active + turn + this.shown.length + (this.active < 0 && turn < 0 ? 1 : 0)) % this.shown.length;
      this._render();
    } else if ((event.key === "Enter" || event.key === "Tab") && this.active >= 0) {
      this._choose(this.active);
    } else if (event.key === "Escape") {
      this.close();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  _choose(number) {
    const end = this.input.selectionStart;
    this.input.setRangeText(this.shown[number], this.start, end, "end");
    this.close();
    this.onChoose();
  }

  close() {
    this.shown = [];
    this.active = -1;
    this._render();
  }
}
