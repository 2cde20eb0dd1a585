// All pages as a PDF (ISO 32000-1): pictures at 300 dpi, frames and balloons as paths, lettering as text in its fonts.

import { framesOf, LAYOUTS, PAGE_WIDTH, pageHeight } from "./layouts.js";
import { fontOf, shapesOf } from "./lettering.js";
import { drawnFrom, FRAME_LINE, INK, loadFonts, printPicture, SIZES } from "./print.js";
import { readFont } from "./ttf.js";

const WIDTH = 6.625 * 72; // points
const FONTS = { words: ["ComicNeue-Bold", "comic-neue-bold"], effect: ["Bangers-Regular", "bangers"] };
const FALLBACK_DPI = 600; // of letters that the fonts lack, which are printed as pictures

const text = (content) => new TextEncoder().encode(content);
const round = (value) => String(Math.round(value * 1000) / 1000);
const numbers = (...values) => values.map(round).join(" ");
const hex4 = (value) => value.toString(16).padStart(4, "0");
const string = (content) => `<feff${[...Array(content.length).keys()].map((i) => hex4(content.charCodeAt(i))).join("")}>`; // UTF-16
const color = (hash, operator) => `${numbers(...[1, 3, 5].map((i) => parseInt(hash.slice(i, i + 2), 16) / 255))} ${operator}`;

async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The objects of a file, numbered from 1.
class Objects {
  constructor() {
    this.found = [];
  }

  reserve() {
    return this.found.push(null);
  }

  add(dictionary, number = this.reserve()) {
    this.found[number - 1] = [text(dictionary)];
    return number;
  }

  async stream(entries, bytes) {
    const data = await deflated(bytes);
    const head = `<< ${entries} /Filter /FlateDecode /Length ${data.length} >>\nstream\n`;
    const number = this.reserve();
    this.found[number - 1] = [text(head), data, text("\nendstream")];
    return number;
  }

  file(root, info) {
    const parts = [text("%PDF-1.7\n%"), Uint8Array.of(0xe2, 0xe3, 0xcf, 0xd3, 10)];
    const offsets = [];
    let at = parts[0].length + parts[1].length;
    const put = (bytes) => { parts.push(bytes); at += bytes.length; };
    this.found.forEach((bodies, index) => {
      offsets.push(at);
      put(text(`${index + 1} 0 obj\n`));
      bodies.forEach(put);
      put(text("\nendobj\n"));
    });
    const table = offsets.map((offset) => `${String(offset).padStart(10, "0")} 00000 n \n`).join("");
    const size = offsets.length + 1;
    parts.push(text(`xref\n0 ${size}\n0000000000 65535 f \n${table}trailer\n<< /Size ${size} /Root ${root} 0 R /Info ${info} 0 R >>\nstartxref\n${at}\n%%EOF\n`));
    return new Blob(parts, { type: "application/pdf" });
  }
}

// A picture whose rows are told by what differs from the row above, which packs flat colours small.
async function image(objects, canvas, { mask } = {}) {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const packed = (channels) => {
    const stride = width * channels.length;
    const bytes = new Uint8Array((stride + 1) * height);
    for (let y = 0; y < height; y++) {
      let to = y * (stride + 1);
      bytes[to++] = 2; // PNG's filter "Up"
      for (let x = 0; x < width; x++) {
        for (const c of channels) {
          const at = 4 * (y * width + x) + c;
          bytes[to++] = data[at] - (y ? data[at - 4 * width] : 0);
        }
      }
    }
    return bytes;
  };
  const entries = (space, colors) => `/Type /XObject /Subtype /Image /Width ${width} /Height ${height} /ColorSpace /${space} /BitsPerComponent 8 /DecodeParms << /Predictor 15 /Colors ${colors} /Columns ${width} >>`;
  const soft = mask ? ` /SMask ${await objects.stream(entries("DeviceGray", 1), packed([3]))} 0 R` : "";
  return objects.stream(entries("DeviceRGB", 3) + soft, packed([0, 1, 2]));
}

async function embedFont(objects, [name, file]) {
  const font = readFont(await (await fetch(`/studio/fonts/${file}.ttf`)).arrayBuffer());
  const measuring = document.createElement("canvas").getContext("2d");
  return { ...font, name, number: objects.reserve(), used: new Map(), measuring };
}

async function finishFont(objects, { name, number, bytes, box, ascent, descent, capHeight, widthOf, used }) {
  const data = await objects.stream(`/Length1 ${bytes.length}`, bytes);
  const descriptor = objects.add(`<< /Type /FontDescriptor /FontName /${name} /Flags 4 /FontBBox [${box.join(" ")}] /ItalicAngle 0 /Ascent ${ascent} /Descent ${descent} /CapHeight ${capHeight} /StemV 120 /FontFile2 ${data} 0 R >>`);
  const widths = [...used.keys()].map((glyph) => `${glyph} [${round(widthOf(glyph))}]`).join(" ");
  const below = objects.add(`<< /Type /Font /Subtype /CIDFontType2 /BaseFont /${name} /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> /FontDescriptor ${descriptor} 0 R /CIDToGIDMap /Identity /W [${widths}] >>`);
  const pairs = [...used].map(([glyph, code]) => `<${hex4(glyph)}> <${hex4(code)}>`);
  const blocks = [];
  for (let i = 0; i < pairs.length; i += 100) blocks.push(`${Math.min(100, pairs.length - i)} beginbfchar\n${pairs.slice(i, i + 100).join("\n")}\nendbfchar`);
  const map = `/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /Letters def /CMapType 2 def\n1 begincodespacerange <0000> <ffff> endcodespacerange\n${blocks.join("\n")}\nendcmap CMapName currentdict /CMap defineresource pop end end`;
  const unicode = await objects.stream("", text(map));
  objects.add(`<< /Type /Font /Subtype /Type0 /BaseFont /${name} /Encoding /Identity-H /DescendantFonts [${below} 0 R] /ToUnicode ${unicode} 0 R >>`, number);
}

// An SVG path of lettering.js as PDF operators.
export function pathOperators(d) {
  const tokens = d.match(/[a-zA-Z](?![-+]?\d*e)|[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?/g);
  const out = [];
  let [at, x, y] = [0, 0, 0];
  const take = (count) => tokens.slice(at, (at += count)).map(Number);
  const line = (toX, toY, operator = "l") => { [x, y] = [toX, toY]; out.push(`${numbers(x, y)} ${operator}`); };
  while (at < tokens.length) {
    const command = tokens[at++];
    if (command === "M") line(...take(2), "m");
    else if (command === "L") line(...take(2));
    else if (command === "h") line(x + take(1)[0], y);
    else if (command === "v") line(x, y + take(1)[0]);
    else if (command === "Z") out.push("h");
    else if (command === "Q") {
      const [cx, cy, toX, toY] = take(4);
      out.push(`${numbers(x + (2 / 3) * (cx - x), y + (2 / 3) * (cy - y), toX + (2 / 3) * (cx - toX), toY + (2 / 3) * (cy - toY), toX, toY)} c`);
      [x, y] = [toX, toY];
    } else if (command === "A" || command === "a") {
      const [rx, ry, , large, sweep, endX, endY] = take(7);
      const [toX, toY] = command === "a" ? [x + endX, y + endY] : [endX, endY];
      out.push(...arc([x, y], [toX, toY], rx, ry, large, sweep));
      [x, y] = [toX, toY];
    } else throw new Error(`a path has ${command}`);
  }
  return out;
}

// An elliptic arc as Bézier curves (SVG 1.1, F.6.5: from its ends to its centre; the axes lie along the page's).
function arc([x1, y1], [x2, y2], rx, ry, large, sweep) {
  let [ux, uy] = [(x1 - x2) / 2 / rx, (y1 - y2) / 2 / ry]; // half the chord on the unit circle
  const half = Math.hypot(ux, uy);
  if (half > 1) [rx, ry, ux, uy] = [rx * half, ry * half, ux / half, uy / half];
  const lift = (large === sweep ? -1 : 1) * Math.sqrt(Math.max(0, 1 / (ux * ux + uy * uy) - 1));
  const [cx, cy] = [lift * uy, -lift * ux];
  const start = Math.atan2(uy - cy, ux - cx);
  let turn = Math.atan2(-uy - cy, -ux - cx) - start;
  if (sweep && turn < 0) turn += 2 * Math.PI;
  if (!sweep && turn > 0) turn -= 2 * Math.PI;
  const [midX, midY] = [cx * rx + (x1 + x2) / 2, cy * ry + (y1 + y2) / 2];
  const count = Math.ceil(Math.abs(turn) / (Math.PI / 2) - 1e-9);
  const step = turn / count;
  const reach = (4 / 3) * Math.tan(step / 4);
  return Array.from({ length: count }, (_, i) => {
    const [a, b] = [start + i * step, start + (i + 1) * step];
    const place = (cos, sin) => [midX + rx * cos, midY + ry * sin];
    return `${numbers(...place(Math.cos(a) - reach * Math.sin(a), Math.sin(a) + reach * Math.cos(a)),
      ...place(Math.cos(b) + reach * Math.sin(b), Math.sin(b) - reach * Math.cos(b)), ...place(Math.cos(b), Math.sin(b)))} c`;
  });
}

// A line of text centred at x, its glyphs where the browser puts them, kerning included.
function lineOperators(font, balloon, { text: words, x, y }) {
  const { measuring, used } = font;
  measuring.font = fontOf({ ...balloon, size: 1000 });
  const upTo = Array.from({ length: words.length + 1 }, (_, i) => measuring.measureText(words.slice(0, i)).width);
  const shown = [...words].map((letter, i) => {
    const glyph = font.glyphOf(letter.charCodeAt(0));
    used.set(glyph, letter.charCodeAt(0));
    const kerning = font.widthOf(glyph) - (upTo[i + 1] - upTo[i]);
    return `<${hex4(glyph)}>${Math.abs(kerning) > 0.5 ? ` ${round(kerning)}` : ""}`;
  });
  const left = x - (upTo.at(-1) * balloon.size) / 2000;
  return `BT /${font.name} 1 Tf ${numbers(balloon.size, 0, 0, -balloon.size, left, y)} Tm [${shown.join(" ")}] TJ ET`;
}

const lacks = (font, words) => [...words].some((letter) => font.glyphOf(letter.codePointAt(0)) === 0);

// A line whose letters the font lacks, as the browser shows it: operators and the picture's object.
async function linePicture(objects, balloon, shapes, { text: words, x, y }) {
  const times = (FALLBACK_DPI * WIDTH) / 72 / PAGE_WIDTH;
  const canvas = new OffscreenCanvas(1, 1);
  const context = canvas.getContext("2d");
  context.font = shapes.font;
  const width = context.measureText(words).width + 2 * balloon.size;
  [canvas.width, canvas.height] = [Math.ceil(width * times), Math.ceil(2 * balloon.size * times)];
  context.scale(times, times);
  Object.assign(context, { font: shapes.font, textAlign: "center", lineJoin: "round", lineWidth: shapes.outline || 1, strokeStyle: INK, fillStyle: shapes.fill });
  if (shapes.outline) context.strokeText(words, width / 2, 1.4 * balloon.size);
  context.fillText(words, width / 2, 1.4 * balloon.size);
  const number = await image(objects, canvas, { mask: true });
  const [across, down] = [canvas.width / times, canvas.height / times];
  return { number, operators: `q ${numbers(across, 0, 0, -down, x - width / 2, y - 1.4 * balloon.size + down)} cm /I${number} Do Q` };
}

async function balloonOperators(objects, balloon, fonts) {
  const shapes = shapesOf(balloon);
  const font = fonts[balloon.kind] ?? fonts.words;
  const angle = (shapes.rotate * Math.PI) / 180;
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  const turned = numbers(cos, sin, -sin, cos, balloon.x - cos * balloon.x + sin * balloon.y, balloon.y - sin * balloon.x - cos * balloon.y);
  const out = [`q ${turned} cm 1 j 1 J`];
  for (const { d, fill, stroke, width } of shapes.paths) out.push(color(fill, "rg"), color(stroke, "RG"), `${width} w`, ...pathOperators(d), "B");
  const pictures = [];
  for (const line of shapes.lines.filter(({ text: words }) => words)) {
    if (lacks(font, line.text)) {
      const { number, operators } = await linePicture(objects, balloon, shapes, line);
      pictures.push(number);
      out.push(operators);
      continue;
    }
    const words = lineOperators(font, balloon, line);
    if (shapes.outline) out.push(color(INK, "RG"), `${round(shapes.outline)} w 1 Tr`, words);
    out.push(color(shapes.fill, "rg"), "0 Tr", words);
  }
  return { operators: [...out, "Q"], pictures };
}

async function addPage(objects, parent, project, page, pictureOf, filter, fonts) {
  const scale = WIDTH / PAGE_WIDTH;
  const height = WIDTH * LAYOUTS[page.layout].ratio;
  const pixels = SIZES.print.width / PAGE_WIDTH;
  const operators = [`q ${numbers(scale, 0, 0, -scale, 0, height)} cm`];
  const pictures = [];
  const frames = framesOf(page.layout, project.direction);
  for (const [index, [x, y, w, h]] of frames.entries()) {
    const picture = pictureOf(index, page);
    if (!picture) continue;
    const canvas = new OffscreenCanvas(Math.round(w * pixels), Math.round(h * pixels));
    printPicture(canvas.getContext("2d"), picture.bitmap, [0, 0, canvas.width, canvas.height], page.panels[index].fit, filter);
    const number = await image(objects, canvas);
    pictures.push(number);
    operators.push(`q ${numbers(w, 0, 0, -h, x, y + h)} cm /I${number} Do Q`);
  }
  operators.push(color(INK, "RG"), `${FRAME_LINE} w`, ...frames.map((frame) => `${numbers(...frame)} re S`));
  for (const balloon of page.balloons) {
    const painted = await balloonOperators(objects, balloon, fonts);
    operators.push(...painted.operators);
    pictures.push(...painted.pictures);
  }
  const content = await objects.stream("", text([...operators, "Q"].join("\n")));
  const named = pictures.map((number) => `/I${number} ${number} 0 R`).join(" ");
  const letters = Object.values(fonts).map(({ name, number }) => `/${name} ${number} 0 R`).join(" ");
  return objects.add(`<< /Type /Page /Parent ${parent} 0 R /MediaBox [0 0 ${numbers(WIDTH, height)}] /Contents ${content} 0 R /Resources << /Font << ${letters} >> /XObject << ${named} >> >> >>`);
}

export async function bookPdf(project, pictureOf, { filter }, defaultModel, onPage = () => {}) {
  await loadFonts();
  const objects = new Objects();
  const fonts = { words: await embedFont(objects, FONTS.words), effect: await embedFont(objects, FONTS.effect) };
  const parent = objects.reserve();
  const pages = [];
  for (const page of project.pages) {
    onPage(pages.length + 1);
    pages.push(await addPage(objects, parent, project, page, pictureOf, filter, fonts));
  }
  objects.add(`<< /Type /Pages /Count ${pages.length} /Kids [${pages.map((number) => `${number} 0 R`).join(" ")}] >>`, parent);
  for (const font of Object.values(fonts)) await finishFont(objects, font);
  const order = project.direction === "rtl" ? " /ViewerPreferences << /Direction /R2L >>" : "";
  const root = objects.add(`<< /Type /Catalog /Pages ${parent} 0 R${order} >>`);
  const told = project.pages.map((page) => drawnFrom(project, page, pictureOf, { size: "print", filter }, defaultModel));
  const info = objects.add(`<< /Title ${string(project.title)} /Creator (onestroke) /onestroke ${string(JSON.stringify({ pages: told }))} >>`);
  return objects.file(root, info);
}
