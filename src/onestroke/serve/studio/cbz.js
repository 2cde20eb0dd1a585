// All pages as a CBZ: a ZIP of PNGs with ComicInfo.xml (the Anansi project's schema, version 2.0) that readers show.

import { crc32 } from "./png.js";
import { pagePng } from "./print.js";

// A ZIP file of stored entries, by PKWARE's APPNOTE: names in UTF-8, no compression (PNGs are compressed).
export async function zip(entries) {
  const [parts, directory] = [[], []];
  let offset = 0;
  for (const { name, blob } of entries) {
    const data = new Uint8Array(await blob.arrayBuffer());
    const label = new TextEncoder().encode(name);
    const fields = new DataView(new ArrayBuffer(26)); // what the local header and the directory share
    fields.setUint16(0, 20, true); // version
    fields.setUint16(2, 0x800, true); // UTF-8 names
    fields.setUint16(8, 0x21, true); // 1 January 1980: the same pages are the same file
    fields.setUint32(10, crc32(data), true);
    fields.setUint32(14, data.length, true);
    fields.setUint32(18, data.length, true);
    fields.setUint16(22, label.length, true);
    const shared = new Uint8Array(fields.buffer);
    parts.push(Uint8Array.of(0x50, 0x4b, 3, 4), shared.slice(), label, data);
    const rest = new DataView(new ArrayBuffer(14)); // comment, disk, attributes, place
    rest.setUint32(10, offset, true);
    directory.push(Uint8Array.of(0x50, 0x4b, 1, 2, 20, 0), shared.slice(), new Uint8Array(rest.buffer), label);
    offset += 4 + 26 + label.length + data.length;
  }
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, entries.length, true);
  end.setUint16(10, entries.length, true);
  end.setUint32(12, directory.reduce((sum, part) => sum + part.length, 0), true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, new Uint8Array(end.buffer)], { type: "application/vnd.comicbook+zip" });
}

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
// XML 1.0 has no place for control characters and lone surrogates.
const xml = (content) => content.toWellFormed().replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "").replace(/[&<>"]/g, (letter) => ESCAPES[letter]);

export function comicInfo(project, pages, models) {
  const names = project.sheet.characters.map(({ name }) => name).join(", ");
  const lines = pages.map(({ blob, width, height }, index) =>
    `    <Page Image="${index}" Type="Story" ImageSize="${blob.size}" ImageWidth="${width}" ImageHeight="${height}" />`);
  return ['<?xml version="1.0" encoding="utf-8"?>', "<ComicInfo>",
    `  <Title>${xml(project.title || "Untitled")}</Title>`,
    `  <Notes>Drawn with onestroke by ${xml(models.join(", "))}. Each page's PNG holds the prompt, seed, model and steps of its panels.</Notes>`,
    `  <PageCount>${pages.length}</PageCount>`,
    `  <Manga>${project.direction === "rtl" ? "YesAndRightToLeft" : "No"}</Manga>`,
    ...(names ? [`  <Characters>${xml(names)}</Characters>`] : []),
    "  <Pages>", ...lines, "  </Pages>", "</ComicInfo>", ""].join("\n");
}

export async function bookCbz(project, pictureOf, options, defaultModel, onPage = () => {}) {
  const pages = [];
  for (const page of project.pages) {
    onPage(pages.length + 1);
    pages.push(await pagePng(project, page, pictureOf, options, defaultModel));
  }
  const models = [...new Set(project.pages.flatMap(({ panels }) => panels.map(({ model }) => model || defaultModel)))];
  const info = new Blob([comicInfo(project, pages, models)], { type: "application/xml" });
  const entries = pages.map(({ blob }, index) => ({ name: `page-${String(index + 1).padStart(3, "0")}.png`, blob }));
  return zip([{ name: "ComicInfo.xml", blob: info }, ...entries]);
}
