// The studio: what is shown follows from the project (history.js) and the pictures (pictures.js).

import { Balloons } from "./balloons.js";
import { Completions } from "./completions.js";
import { Desk } from "./desk.js";
import { History } from "./history.js";
import { Inspector } from "./inspector.js";
import { framesOf, LAYOUTS } from "./layouts.js";
import { Live } from "./live.js";
import { PageView } from "./page.js";
import { Pages } from "./pages.js";
import { newBalloon, newProject } from "./project.js";
import { Files } from "./files.js";
import { recall, remember } from "./memory.js";
import { SheetView } from "./sheet_view.js";

const $ = (selector) => document.querySelector(selector);

// A server with a token is opened as ADDRESS/#token=...: the part after # is sent to nobody.
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token") ?? "";
if (token) sessionStorage.setItem("token", token);
if (location.hash) history.replaceState(null, "", location.pathname);

async function ask(path) {
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  if (!answer.ok) throw new Error((await answer.json()).error?.message ?? answer.statusText);
  return answer.json();
}

function say(message) {
  const toast = $("#toast");
  toast.textContent = message;
  toast.hidden = !message;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { toast.hidden = true; }, 6000);
}

async function begin() {
  let models;
  try {
    models = (await ask("/v1/models")).data;
  } catch (error) {
    say(`${error.message}${token ? "" : " Open the address that the server printed, with its #token."}`);
    return setTimeout(begin, 3000);
  }
  const saved = await recall();
  const store = new History(saved?.project ?? newProject());
  const live = new Live(token);
  const desk = new Desk(store, live, models);
  if (saved) await desk.restore(saved.pictures);
  const balloons = new Balloons($("#lettering"), store);
  const page = new PageView($("#page"), store, desk);
  const inspector = new Inspector(store, desk, page, balloons, models, say);
  const files = new Files(store, desk, say);
  const pages = new Pages(store, desk);
  const sheet = new SheetView(store, say, write);
  const completions = new Completions($("#prompt"), $("#completions"), () => $("#prompt").dispatchEvent(new Event("input")));
  ask(`/v1/phrases?model=${encodeURIComponent(models[0].id)}`).then(({ phrases }) => { completions.phrases = phrases; }, () => {});
  completions.names = () => store.project.sheet.characters.flatMap(({ name, attributes }) => [`@${name}`, ...attributes.map((one) => `@${name}.${one.name}`)]);
  $("#save-picture").addEventListener("click", () => files.savePicture(page.selected));

  wireBar(store, balloons, page);
  wireLettering(store, balloons, page);
  wireKeys(store, inspector, files);

  const render = () => {
    page.render();
    balloons.render();
    inspector.render();
    sheet.render();
    pages.render();
    renderBar(store);
  };
  store.addEventListener("change", () => {
    desk.redraw();
    render();
    $("#saved").textContent = "Saving…";
    remember(store, desk).then(() => { $("#saved").textContent = "Saved in this browser"; },
                               () => { $("#saved").textContent = "Not saved: this browser has no room. Use Save."; });
  });
  desk.addEventListener("change", () => { page.paint(); inspector.renderPicture(); renderStatus(live, desk); });
  desk.addEventListener("fault", ({ detail }) => say(detail));
  page.addEventListener("select", render);
  store.addEventListener("turn", ({ detail }) => { balloons.select(null); if (detail.moved) page.selected = 0; });
  balloons.addEventListener("select", () => inspector.renderBalloon());
  balloons.addEventListener("write", () => $("#balloon-text").focus());
  live.addEventListener("state", () => { renderStatus(live, desk); if (live.state === "open") desk.redraw(); });
  await document.fonts.load('700 20px "Comic Neue"').catch(() => {});
  await document.fonts.load('400 20px "Bangers"').catch(() => {});
  desk.redraw();
  render();
  renderStatus(live, desk);
  document.body.dataset.ready = "true";
}

// Write into the panel's words, where the cursor is.
function write(words) {
  const prompt = $("#prompt");
  const before = prompt.value.slice(0, prompt.selectionStart);
  prompt.setRangeText(`${before && !/\s$/.test(before) ? " " : ""}${words} `, prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input"));
  prompt.focus();
}

function wireBar(store, balloons, page) {
  const layout = $("#layout");
  layout.replaceChildren(...Object.entries(LAYOUTS).map(([id, { name }]) => new Option(name, id)));
  layout.addEventListener("change", () => store.changePage("layout", (page) => ({ ...page, layout: layout.value })));
  $("#direction").addEventListener("change", ({ target }) => store.change("direction", (project) => ({ ...project, direction: target.value })));
  $("#title").addEventListener("input", ({ target }) => store.change("title", (project) => ({ ...project, title: target.value.slice(0, 200) })));
  $("#undo").addEventListener("click", () => store.undo());
  $("#redo").addEventListener("click", () => store.redo());
  $("#theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
  });
  $("#page").addEventListener("pointerdown", () => balloons.select(null));
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  page.select(0);
}

function wireLettering(store, balloons, page) {
  for (const button of document.querySelectorAll("[data-letter]")) {
    button.addEventListener("click", () => {
      const frames = framesOf(store.page.layout, store.project.direction);
      const frame = frames[Math.min(page.selected, frames.length - 1)];
      const balloon = newBalloon(button.dataset.letter, ...spotIn(frame, button.dataset.letter, store.page.balloons));
      store.changePage("add lettering", (page) => ({ ...page, balloons: [...page.balloons, balloon] }));
      store.settle();
      balloons.select(balloon.id);
      $("#balloon-text").focus();
      $("#balloon-text").select();
    });
  }
  $("#balloon-text").addEventListener("input", ({ target }) => store.balloon(balloons.selected, "words", { text: target.value.slice(0, 600) }));
  $("#balloon-size").addEventListener("input", ({ target }) => store.balloon(balloons.selected, "size", { size: Number(target.value) }));
  $("#balloon-delete").addEventListener("click", () => balloons.remove());
}

// Where new lettering goes in a frame: captions in its corner, effects low, balloons at the top, each clear of the last.
function spotIn([x, y, width, height], kind, balloons) {
  const inside = balloons.filter((other) => other.x > x && other.x < x + width && other.y > y && other.y < y + height);
  const number = inside.filter((other) => (other.kind === "effect") === (kind === "effect")).length;
  const down = 95 * Math.floor(number / 2);
  if (kind === "caption") return [x + Math.min(120, width / 2), y + 34 + 50 * number];
  if (kind === "effect") return [x + width * 0.6, y + height * 0.85 - down];
  const side = Math.max(150, width * (number % 2 ? 0.7 : 0.32));
  return [x + Math.min(side, Math.max(width / 2, width - 140)), y + Math.min(height * 0.8, Math.max(80, height * 0.14) + down)];
}

function wireKeys(store, inspector, files) {
  window.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (command && key === "z") event.shiftKey ? store.redo() : store.undo();
    else if (command && key === "y") store.redo();
    else if (command && key === "s") files.save();
    else if (command && key === "enter") inspector.variants();
    else return;
    event.preventDefault();
  });
}

function renderBar(store) {
  const { project } = store;
  $("#layout").value = store.page.layout;
  $("#direction").value = project.direction;
  if (document.activeElement !== $("#title")) $("#title").value = project.title;
  for (const [id, steps] of [["#undo", store.past], ["#redo", store.future]]) {
    $(id).disabled = steps.length === 0;
    $(id).title = steps.length ? `${id.slice(1)}: ${steps.at(-1).name.replace(/ [0-9a-f-]{36}/, "")}` : "";
  }
}

function renderStatus(live, desk) {
  const names = { open: "Connected", connecting: "Connecting…", lost: "Connection lost. Trying again; nothing is lost." };
  const status = $("#connection");
  if (status.textContent !== names[live.state]) status.textContent = names[live.state];
  status.dataset.state = live.state;
  const { timings, trip } = desk.lastTimes ?? {};
  $("#timing").textContent = timings ? `${Math.round(trip)} ms from key to picture · waiting ${timings.queue} · drawing ${timings.draw} · file ${timings.encode}` : "";
}

begin();
