// The character and style sheet as a form. What is typed here is in every panel at once.

import { MAX_ATTRIBUTES, MAX_CHARACTERS, NAME, newCharacter } from "./sheet.js";

const $ = (selector) => document.querySelector(selector);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export class SheetView {
  constructor(history, say, insert) {
    Object.assign(this, { history, say, insert, shape: "" });
    $("#style").addEventListener("input", ({ target }) => this._sheet("style", { style: target.value.slice(0, 400) }));
    $("#character-add").addEventListener("click", () => this.add());
  }

  get sheet() {
    return this.history.project.sheet;
  }

  _sheet(name, fields) {
    this.history.change(name, (project) => ({ ...project, sheet: { ...project.sheet, ...fields } }));
  }

  _characters(name, make) {
    this._sheet(name, { characters: make(this.sheet.characters) });
  }

  _character(id, name, fields) {
    this._characters(`${name} of character ${id}`, (all) => all.map((one) => (one.id === id ? { ...one, ...fields } : one)));
  }

  add() {
    if (this.sheet.characters.length >= MAX_CHARACTERS) return;
    const made = newCharacter(this.sheet.characters);
    this._characters("add character", (all) => [...all, made]);
    this.history.settle();
    $("#characters").lastChild.querySelector("input").select();
  }

  render() {
    const { style, characters } = this.sheet;
    if ($("#style").value !== style) $("#style").value = style;
    $("#character-add").disabled = characters.length >= MAX_CHARACTERS;
    // The form is built anew only where a row came or went: whoever types keeps the place.
    const shape = JSON.stringify(characters.map(({ id, attributes }) => [id, attributes.length]));
    if (shape !== this.shape) $("#characters").replaceChildren(...characters.map((character) => this._card(character.id)));
    this.shape = shape;
    characters.forEach((character, index) => {
      const inputs = [...$("#characters").children[index].querySelectorAll("input")];
      const values = [character.name, ...character.attributes.flatMap(({ name, words }) => [name, words])];
      inputs.forEach((input, i) => {
        if (input.value !== values[i] && input !== document.activeElement) input.value = values[i];
      });
    });
  }

  _find(id) {
    return this.sheet.characters.find((one) => one.id === id);
  }

  _card(id) {
    const character = this._find(id);
    const name = element("input", { value: character.name, maxLength: 40, className: "name" });
    name.setAttribute("aria-label", "Character's name");
    this._named(name, () => this._find(id).name, (value) => {
      if (this.sheet.characters.some((one) => one.id !== id && one.name.toLowerCase() === value.toLowerCase())) return false;
      this._character(id, "name", { name: value });
      return true;
    });
    const use = element("button", { type: "button", textContent: "Put in panel" });
    use.addEventListener("click", () => this.insert(`@${this._find(id).name}`));
    const rows = character.attributes.map((_, index) => this._row(id, index));
    const more = element("button", { type: "button", textContent: "Add attribute" });
    more.addEventListener("click", () => {
      const { attributes } = this._find(id);
      if (attributes.length >= MAX_ATTRIBUTES) return;
      this._character(id, "add attribute", { attributes: [...attributes, { name: `attribute${attributes.length + 1}`, words: "" }] });
      this.history.settle();
    });
    const remove = element("button", { type: "button", textContent: "Remove character", className: "danger" });
    remove.addEventListener("click", () => {
      this._characters("remove character", (all) => all.filter((one) => one.id !== id));
      this.history.settle();
    });
    const card = element("li", { className: "character" }, element("div", { className: "joined" }, name, use), ...rows,
                         element("div", { className: "actions" }, more, remove));
    return card;
  }

  _row(id, index) {
    const label = element("input", { maxLength: 40 });
    label.setAttribute("aria-label", "Attribute's name");
    const words = element("input", { maxLength: 200 });
    words.setAttribute("aria-label", "Attribute's words");
    const set = (fields) => {
      const attributes = this._find(id).attributes.map((one, i) => (i === index ? { ...one, ...fields } : one));
      this._character(id, `attribute ${index + 1}`, { attributes });
    };
    this._named(label, () => this._find(id).attributes[index].name, (name) => { set({ name }); return true; });
    words.addEventListener("input", () => set({ words: words.value }));
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove attribute ${index + 1}`);
    remove.addEventListener("click", () => {
      this._character(id, "remove attribute", { attributes: this._find(id).attributes.filter((_, i) => i !== index) });
      this.history.settle();
    });
    return element("div", { className: "attribute" }, label, words, remove);
  }

  // A name is taken once it is whole; one that prompts could not hold is put back.
  _named(input, current, take) {
    input.addEventListener("change", () => {
      const value = input.value.trim().replace(/\s+/g, "-");
      if (NAME.test(value) && take(value)) return;
      this.say("A name is of letters, digits, - and _, and no other character has it.");
      input.value = current();
    });
  }
}
