// The page as a PNG at print size, with its resolution and what it was drawn from inside.

import { framesOf, LAYOUTS, PAGE_WIDTH, pageHeight } from "./layouts.js";
import { paintBalloon } from "./lettering.js";
import { paintPicture } from "./pictures.js";

export const SIZES = {
  print: { name: "Print, 300 dpi (6.625 in wide)", width: 1988, dpi: 300 },
  screen: { name: "Screen (1000 px wide)", width: 1000, dpi: 96 },
  web: { name: "Webtoon (800 px wide)", width: 800, dpi: 96 },
};

// What each picture is enlarged by at `width` pixels: [{index, times, dpi}].
export function enlargements(project, pictureOf, size) {
  const { width, dpi } = SIZES[size];
  return framesOf(project.layout, project.direction).flatMap((frame, index) => {
    const picture = pictureOf(index);
    if (!picture) return [];
    const pick = project.panels[index].fit === "fill" ? Math.max : Math.min;
    const unit = width / PAGE_WIDTH;
    const times = pick((frame[2] * unit) / picture.bitmap.width, (frame[3] * unit) / picture.bitmap.height);
    return [{ index, times, dpi: dpi / times }];
  });
}

export async function pagePng(project, pictureOf, size, defaultModel) {
  const { width, dpi } = SIZES[size];
  await Promise.all(['700 20px "Comic Neue"', '400 20px "Bangers"'].map((font) => document.fonts.load(font)));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.round(width * LAYOUTS[project.layout].ratio);
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.scale(width / PAGE_WIDTH, canvas.height / pageHeight(project.layout));
  framesOf(project.layout, project.direction).forEach((frame, index) => {
    const picture = pictureOf(index);
    if (picture) paintPicture(context, picture.bitmap, frame, project.panels[index].fit);
    context.strokeStyle = "#161418";
    context.lineWidth = 3.5;
    context.strokeRect(...frame);
  });
  for (const balloon of project.balloons) paintBalloon(context, balloon);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const drawnFrom = framesOf(project.layout, project.direction).map((_, index) => {
    const { prompt, seed, steps, model, sketch } = project.panels[index];
    return { panel: index + 1, prompt, seed, steps, model: model || defaultModel, strength: sketch?.strength };
  });
  return withChunks(blob, [physical(dpi), international("onestroke", JSON.stringify({ title: project.title, panels: drawnFrom }))]);
}

// PNG chunks, by the PNG specification: length, type, data, CRC-32 of type and data.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + data.length)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, (crc ^ 0xffffffff) >>> 0);
  return bytes;
}

function physical(dpi) {
  const data = new DataView(new ArrayBuffer(9));
  data.setUint32(0, Math.round(dpi / 0.0254)); // pixels a metre
  data.setUint32(4, Math.round(dpi / 0.0254));
  data.setUint8(8, 1);
  return chunk("pHYs", new Uint8Array(data.buffer));
}

const international = (keyword, content) => chunk("iTXt", new TextEncoder().encode(`${keyword}\0\0\0\0\0${content}`));

async function withChunks(blob, chunks) {
  const HEAD = 8 + 25; // signature and IHDR, which come first
  return new Blob([blob.slice(0, HEAD), ...chunks, blob.slice(HEAD)], { type: "image/png" });
}
