// What a project is, and the checks that a stranger's file must pass. Everything in it is plain data: strings are only
// ever shown as text, pictures are decoded as pictures, and what is not known is left out.

import { LAYOUTS } from "./layouts.js";

export const FORMAT = "onestroke-project";
export const VERSION = 1;
export const MAX_PANELS = 9;
export const KINDS = ["speech", "thought", "shout", "caption", "effect"];
export const STEPS = [1, 2, 4];
const PICTURE = /^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/]+=*$/;
const MAX_PICTURE = 8_000_000; // characters

export function newPanel(index) {
  return { prompt: "", seed: index + 1, locked: true, steps: 1, model: "", fit: "whole", sketch: null };
}

export function newProject() {
  const panels = Array.from({ length: MAX_PANELS }, (_, index) => newPanel(index));
  panels[0].prompt = "a laughing person with pink hair and round glasses";
  return { format: FORMAT, version: VERSION, title: "", layout: "three", direction: "ltr", panels, balloons: [] };
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

// The project in a file's text, and the pictures that were saved with it: {project, pictures: Map of key to data address}.
// Throws an Error that says what is wrong.
export function readProject(content) {
  let value;
  try {
    value = JSON.parse(content);
  } catch {
    throw new Error("This file is no project: it is not JSON.");
  }
  if (!value || value.format !== FORMAT) throw new Error("This file is no onestroke project.");
  if (value.version !== VERSION) throw new Error(`This project is of version ${Number(value.version)}; this page reads ${VERSION}.`);
  try {
    if (!Array.isArray(value.panels) || value.panels.length !== MAX_PANELS) throw new Fault(`there are not ${MAX_PANELS} panels`);
    if (!Array.isArray(value.balloons) || value.balloons.length > 200) throw new Fault("there are too many balloons");
    const pictures = new Map();
    for (const [key, data] of Object.entries(value.pictures ?? {}).slice(0, 64)) pictures.set(text(key, "a picture's key", 9000), picture(data, "a picture"));
    const project = {
      format: FORMAT, version: VERSION,
      title: text(value.title, "the title", 200),
      layout: one(value.layout, "the layout", Object.keys(LAYOUTS)),
      direction: one(value.direction, "the direction", ["ltr", "rtl"]),
      panels: value.panels.map(panelOf),
      balloons: value.balloons.map(balloonOf),
    };
    return { project, pictures };
  } catch (error) {
    throw new Error(`This project cannot be opened: ${error instanceof Fault ? error.message : "it is damaged"}.`);
  }
}

export function writeProject(project, pictures) {
  const balloons = project.balloons.map(({ id, ...rest }) => rest); // a name within this page alone
  return JSON.stringify({ ...project, balloons, pictures: Object.fromEntries(pictures) }, null, 1);
}
