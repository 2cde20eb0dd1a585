// Pages for print: as a PNG with its resolution and what it was drawn from inside, and in small for the list of pages.

import { enlarged, FILTERS } from "./enlarge.js";
import { framesOf, LAYOUTS, PAGE_WIDTH, pageHeight } from "./layouts.js";
import { paintBalloon } from "./lettering.js";
import { paintPicture } from "./pictures.js";
import { international, physical, withChunks } from "./png.js";
import { spoken } from "./sheet.js";

export const INK = "#161418";
export const FRAME_LINE = 3.5; // page units
export const SIZES = {
  print: { name: "Print, 300 dpi (6.625 in wide)", width: 1988, dpi: 300 },
  screen: { name: "Screen (1000 px wide)", width: 1000, dpi: 96 },
  web: { name: "Webtoon (800 px wide)", width: 800, dpi: 96 },
};

export const loadFonts = () => Promise.all(['700 20px "Comic Neue"', '400 20px "Bangers"'].map((font) => document.fonts.load(font)));

// What a picture is enlarged by in a frame of `width` x `height` pixels.
function timesIn([width, height], bitmap, fit) {
  const pick = fit === "fill" ? Math.max : Math.min;
  return pick(width / bitmap.width, height / bitmap.height);
}

// What each panel of a page was drawn from and how it is printed: {panel, prompt, seed, steps, model, strength, lora, enlarged}.
export function drawnFrom(project, page, pictureOf, { size, filter }, defaultModel) {
  const { width, dpi } = SIZES[size];
  const unit = width / PAGE_WIDTH;
  return framesOf(page.layout, project.direction).map((frame, index) => {
    const { prompt, seed, steps, model, sketch, lora, fit } = page.panels[index];
    const told = spoken(prompt, project.sheet).prompt;
    const entry = { panel: index + 1, prompt: told, seed, steps, model: model || defaultModel, strength: sketch?.strength,
                    lora: lora ?? undefined };
    const picture = told ? pictureOf(index, page) : undefined;
    if (!picture) return { ...entry, enlarged: null };
    const times = timesIn([frame[2] * unit, frame[3] * unit], picture.bitmap, fit);
    const by = times > 1 ? FILTERS[filter].told : FILTERS.smooth.told;
    return { ...entry, enlarged: { by, times: Number(times.toFixed(2)), effective_dpi: Math.round(dpi / times) } };
  });
}

// Paint a picture into a frame of whole pixels, by our own filter.
export function printPicture(context, bitmap, frame, fit, filter) {
  const [x, y, right, bottom] = [frame[0], frame[1], frame[0] + frame[2], frame[1] + frame[3]].map(Math.round);
  const times = timesIn([right - x, bottom - y], bitmap, fit);
  const large = enlarged(bitmap, Math.round(bitmap.width * times), Math.round(bitmap.height * times), filter);
  paintPicture(context, large, [x, y, right - x, bottom - y], fit);
}

// A page at `width` pixels; without a filter by the browser's own, which is quick.
export function pageCanvas(project, page, pictureOf, width, filter) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.round(width * LAYOUTS[page.layout].ratio);
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const [across, down] = [width / PAGE_WIDTH, canvas.height / pageHeight(page.layout)];
  const frames = framesOf(page.layout, project.direction);
  frames.forEach(([x, y, w, h], index) => {
    const picture = pictureOf(index, page);
    const frame = [x * across, y * down, w * across, h * down];
    if (picture && filter) printPicture(context, picture.bitmap, frame, page.panels[index].fit, filter);
    else if (picture) paintPicture(context, picture.bitmap, frame, page.panels[index].fit);
  });
  context.scale(across, down);
  context.strokeStyle = INK;
  context.lineWidth = filter ? FRAME_LINE : 9; // seen in small
  for (const frame of frames) context.strokeRect(...frame);
  for (const balloon of page.balloons) paintBalloon(context, balloon);
  return canvas;
}

export async function pagePng(project, page, pictureOf, options, defaultModel) {
  const { width, dpi } = SIZES[options.size];
  await loadFonts();
  const canvas = pageCanvas(project, page, pictureOf, width, options.filter);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const panels = drawnFrom(project, page, pictureOf, options, defaultModel);
  const number = project.pages.indexOf(page) + 1;
  const chunks = [physical(dpi), international("onestroke", JSON.stringify({ title: project.title, page: number, panels }))];
  return { blob: await withChunks(blob, chunks), width: canvas.width, height: canvas.height };
}
