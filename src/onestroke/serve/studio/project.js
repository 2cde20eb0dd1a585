// What a project is, and the checks that a stranger's file must pass. Everything in it is plain data: strings are only
// ever shown as text, pictures are decoded as pictures, and what is not known is left out.

import { LAYOUTS } from "./layouts.js";
import { MAX_ATTRIBUTES, MAX_CHARACTERS, NAME, newSheet } from "./sheet.js";

export const FORMAT = "onestroke-project";
export const VERSION = 2;
export const MAX_PANELS = 9; // of a page
export const MAX_PAGES = 24;
const MAX_PICTURES = MAX_PANELS * MAX_PAGES;
export const KINDS = ["speech", "thought", "shout", "caption", "effect"];
export const STEPS = [1, 2, 4];
export const MAX_LORA = 2; // of its strength, either way
const PICTURE = /^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/]+=*$/;
const MAX_PICTURE = 8_000_000; // characters

export function newPanel(index) {
  return { prompt: "", seed: index + 1, locked: true, steps: 1, model: "", lora: null, fit: "whole", sketch: null };
}

export function newPage(layout = "three") {
  const panels = Array.from({ length: MAX_PANELS }, (_, index) => newPanel(index));
  return { id: crypto.randomUUID(), layout, panels, balloons: [] };
}

export function newProject() {
  const page = newPage();
  page.panels[0].prompt = "a laughing person with pink hair and round glasses";
  return { format: FORMAT, version: VERSION, title: "", direction: "ltr", sheet: newSheet(), pages: [page] };
}

export function newBalloon(kind, x, y) {
  const words = { speech: "Hello!", thought: "Hmm…", shout: "Look out!", caption: "Meanwhile…", effect: "Boom!" };
  const tail = ["speech", "thought", "shout"].includes(kind) ? { x: x + 30, y: y + 125 } : null;
  return { id: crypto.randomUUID(), kind, text: words[kind], x, y, width: kind === "effect" ? 400 : 190,
           size: kind === "effect" ? 84 : 26, tail };
}

class Fault extends Error {}

const text = (value, what, most) => {
  if (typeof value !== "string" || value.length > most) throw new Fault(`${what} is no text of at most ${most} characters`);
  return value;
};
const number = (value, what, low, high) => {
  if (typeof value !== "number" || !(value >= low && value <= high)) throw new Fault(`${what} is no number from ${low} to ${high}`);
  return value;
};
const whole = (value, what, low, high) => {
  if (!Number.isInteger(value)) throw new Fault(`${what} is no whole number`);
  return number(value, what, low, high);
};
const one = (value, what, choices) => {
  if (!choices.includes(value)) throw new Fault(`${what} is none of ${choices.join(", ")}`);
  return value;
};
const picture = (value, what) => {
  if (typeof value !== "string" || value.length > MAX_PICTURE || !PICTURE.test(value)) throw new Fault(`${what} is no picture`);
  return value;
};

function panelOf(value, index) {
  const what = `panel ${index + 1}`;
  const sketch = value.sketch && {
    image: picture(value.sketch.image, `${what}'s sketch`),
    mask: value.sketch.mask ? picture(value.sketch.mask, `${what}'s mask`) : null,
    strength: number(value.sketch.strength, `${what}'s strength`, 0.01, 1),
  };
  return {
    prompt: text(value.prompt, `${what}'s prompt`, 2000),
    seed: whole(value.seed, `${what}'s seed`, 0, 2 ** 32 - 1),
    locked: value.locked !== false,
    steps: whole(value.steps, `${what}'s steps`, 1, 50),
    model: text(value.model, `${what}'s model`, 200),
    lora: value.lora ? {
      name: text(value.lora.name, `${what}'s LoRA`, 80),
      scale: number(value.lora.scale, `${what}'s LoRA's strength`, -MAX_LORA, MAX_LORA),
    } : null,
    fit: one(value.fit, `${what}'s fit`, ["whole", "fill"]),
    sketch: sketch || null,
  };
}

function balloonOf(value, index) {
  const what = `balloon ${index + 1}`;
  const place = (spot, name) => ({ x: number(spot.x, name, -2000, 6000), y: number(spot.y, name, -2000, 6000) });
  return {
    id: crypto.randomUUID(),
    kind: one(value.kind, `${what}'s kind`, KINDS),
    text: text(value.text, `${what}'s text`, 600),
    ...place(value, `${what}'s place`),
    width: number(value.width, `${what}'s width`, 40, 1000),
    size: number(value.size, `${what}'s size`, 8, 300),
    tail: value.tail ? place(value.tail, `${what}'s tail`) : null,
  };
}

function pageOf(value, index) {
  const what = `page ${index + 1}`;
  if (!Array.isArray(value.panels) || value.panels.length !== MAX_PANELS) throw new Fault(`${what} has not ${MAX_PANELS} panels`);
  if (!Array.isArray(value.balloons) || value.balloons.length > 200) throw new Fault(`${what} has too many balloons`);
  return {
    id: crypto.randomUUID(),
    layout: one(value.layout, `${what}'s layout`, Object.keys(LAYOUTS)),
    panels: value.panels.map(panelOf),
    balloons: value.balloons.map(balloonOf),
  };
}

const nameOf = (value, what) => {
  if (!NAME.test(text(value, what, 40))) throw new Fault(`${what} is no name of letters and digits`);
  return value;
};

function sheetOf(value) {
  const list = (found, most, what) => {
    if (!Array.isArray(found) || found.length > most) throw new Fault(`there are too many ${what}`);
    return found;
  };
  return {
    style: text(value.style, "the style", 400),
    characters: list(value.characters, MAX_CHARACTERS, "characters").map((character, index) => ({
      id: crypto.randomUUID(),
      name: nameOf(character.name, `character ${index + 1}'s name`),
      attributes: list(character.attributes, MAX_ATTRIBUTES, "attributes").map((attribute) => ({
        name: nameOf(attribute.name, "an attribute's name"),
        words: text(attribute.words, "an attribute", 200),
      })),
    })),
  };
}

// The project in a file's text, and the pictures that were saved with it: {project, pictures: Map of key to data address}.
// A file of version 1 holds one page and no sheet. Throws an Error that says what is wrong.
export function readProject(content) {
  let value;
  try {
    value = JSON.parse(content);
  } catch {
    throw new Error("This file is no project: it is not JSON.");
  }
  if (!value || value.format !== FORMAT) throw new Error("This file is no onestroke project.");
  if (value.version !== 1 && value.version !== VERSION) throw new Error(`This project is of version ${Number(value.version)}; this page reads 1 and ${VERSION}.`);
  try {
    const pages = value.version === 1 ? [value] : value.pages;
    if (!Array.isArray(pages) || pages.length < 1 || pages.length > MAX_PAGES) throw new Fault(`there are not 1 to ${MAX_PAGES} pages`);
    const pictures = new Map();
    for (const [key, data] of Object.entries(value.pictures ?? {}).slice(0, MAX_PICTURES)) pictures.set(text(key, "a picture's key", 9000), picture(data, "a picture"));
    const project = {
      format: FORMAT, version: VERSION,
      title: text(value.title, "the title", 200),
      direction: one(value.direction, "the direction", ["ltr", "rtl"]),
      sheet: value.version === 1 ? newSheet() : sheetOf(value.sheet),
      pages: pages.map(pageOf),
    };
    return { project, pictures };
  } catch (error) {
    throw new Error(`This project cannot be opened: ${error instanceof Fault ? error.message : "it is damaged"}.`);
  }
}

export function writeProject(project, pictures) {
  const anonymous = ({ id, ...rest }) => rest; // an id is a name within this browser's page alone
  const pages = project.pages.map((page) => ({ ...anonymous(page), balloons: page.balloons.map(anonymous) }));
  const sheet = { ...project.sheet, characters: project.sheet.characters.map(anonymous) };
  return JSON.stringify({ ...project, sheet, pages, pictures: Object.fromEntries(pictures) }, null, 1);
}
