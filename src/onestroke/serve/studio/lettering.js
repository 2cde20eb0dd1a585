// Balloons, captions and sound effects as shapes: one description that SVG shows and a canvas prints.

const INK = "#161418";
const PAPER = "#ffffff";
const LINE = 1.12; // of the letters' size
const fonts = { effect: "Bangers", other: "Comic Neue" };
const measuring = document.createElement("canvas").getContext("2d");

export const fontOf = (balloon) => `${balloon.kind === "effect" ? 400 : 700} ${balloon.size}px "${fonts[balloon.kind] ?? fonts.other}", "Comic Sans MS", cursive`;

// {paths: [{d, fill, stroke, width}], lines: [{text, x, y}], font, fill, outline, rotate, box: [x, y, width, height]}, in
// page units around the balloon's centre.
export function shapesOf(balloon) {
  const lines = wrapped(balloon);
  measuring.font = fontOf(balloon);
  const width = Math.max(balloon.size, ...lines.map((line) => measuring.measureText(line).width));
  const height = lines.length * balloon.size * LINE;
  const first = balloon.y - height / 2 + balloon.size * 0.82;
  const placed = lines.map((text, i) => ({ text, x: balloon.x, y: first + i * balloon.size * LINE }));
  const common = { lines: placed, font: fontOf(balloon), size: balloon.size, fill: INK, outline: 0, rotate: 0 };
  const [halfWidth, halfHeight] = {
    speech: [width * 0.64 + 16, height * 0.68 + 15],
    thought: [width * 0.66 + 18, height * 0.7 + 18],
    shout: [width * 0.78 + 24, height * 0.92 + 24],
    caption: [width / 2 + 14, height / 2 + 9],
    effect: [width / 2 + 8, height / 2],
  }[balloon.kind];
  const box = [balloon.x - halfWidth, balloon.y - halfHeight, 2 * halfWidth, 2 * halfHeight];
  const path = (d, fill = PAPER) => ({ d, fill, stroke: INK, width: balloon.kind === "shout" ? 4 : 3 });
  if (balloon.kind === "effect") return { ...common, paths: [], fill: "#ffd83d", outline: balloon.size * 0.16, rotate: -7, box };
  if (balloon.kind === "caption") return { ...common, paths: [path(rectangle(box), "#fff3c4")], box };
  const shape = { speech, thought, shout }[balloon.kind](balloon, halfWidth, halfHeight);
  return { ...common, paths: shape.map((d) => path(d)), box };
}

function wrapped(balloon) {
  measuring.font = fontOf(balloon);
  const lines = [];
  for (const part of balloon.text.toUpperCase().split("\n")) {
    let line = "";
    for (const word of part.split(/\s+/)) {
      const longer = line ? `${line} ${word}` : word;
      if (line && measuring.measureText(longer).width > balloon.width) {
        lines.push(line);
        line = word;
      } else {
        line = longer;
      }
    }
    lines.push(line);
  }
  return lines;
}

const rectangle = ([x, y, width, height]) => `M${x} ${y}h${width}v${height}h${-width}Z`;

// A point of the ellipse around the balloon's centre.
const point = (balloon, rx, ry, angle) => [balloon.x + rx * Math.cos(angle), balloon.y + ry * Math.sin(angle)];

// The direction of the tail as an angle of the ellipse; null where its tip lies inside.
function tailAngle(balloon, rx, ry) {
  if (!balloon.tail) return null;
  const [x, y] = [(balloon.tail.x - balloon.x) / rx, (balloon.tail.y - balloon.y) / ry];
  return Math.hypot(x, y) < 1.08 ? null : Math.atan2(y, x);
}

function speech(balloon, rx, ry) {
  const angle = tailAngle(balloon, rx, ry);
  if (angle === null) return [`M${balloon.x - rx} ${balloon.y}a${rx} ${ry} 0 1 1 ${2 * rx} 0a${rx} ${ry} 0 1 1 ${-2 * rx} 0Z`];
  const spread = Math.min(0.34, 26 / Math.min(rx, ry));
  const [ax, ay] = point(balloon, rx, ry, angle + spread);
  const [bx, by] = point(balloon, rx, ry, angle - spread);
  const { x, y } = balloon.tail;
  const [cx, cy] = point(balloon, rx, ry, angle);
  const bend = (px, py) => `${(px + cx + x) / 3} ${(py + cy + y) / 3}`;
  return [`M${x} ${y}Q${bend(ax, ay)} ${ax} ${ay}A${rx} ${ry} 0 1 1 ${bx} ${by}Q${bend(bx, by)} ${x} ${y}Z`];
}

function thought(balloon, rx, ry) {
  const lobes = Math.max(9, Math.round((rx + ry) / 22));
  let cloud = "";
  for (let i = 0; i <= lobes; i++) {
    const [x, y] = point(balloon, rx * 0.94, ry * 0.94, (2 * Math.PI * i) / lobes + 0.2);
    const [px, py] = point(balloon, rx * 0.94, ry * 0.94, (2 * Math.PI * (i - 1)) / lobes + 0.2);
    const radius = Math.hypot(x - px, y - py) * 0.56;
    cloud += i === 0 ? `M${x} ${y}` : `A${radius} ${radius} 0 0 1 ${x} ${y}`;
  }
  const angle = tailAngle(balloon, rx, ry);
  if (angle === null) return [`${cloud}Z`];
  const [ex, ey] = point(balloon, rx, ry, angle);
  const puffs = [0.3, 0.62, 0.95].map((share, i) => {
    const radius = 13 - 4 * i;
    const [x, y] = [ex + (balloon.tail.x - ex) * share, ey + (balloon.tail.y - ey) * share];
    return `M${x - radius} ${y}a${radius} ${radius} 0 1 1 ${2 * radius} 0a${radius} ${radius} 0 1 1 ${-2 * radius} 0Z`;
  });
  return [`${cloud}Z`, ...puffs];
}

function shout(balloon, rx, ry) {
  const spikes = 15;
  const angle = tailAngle(balloon, rx, ry);
  const turn = (2 * Math.PI) / spikes;
  const nearest = angle === null ? -1 : ((Math.round(angle / turn) % spikes) + spikes) % spikes;
  let d = "";
  for (let i = 0; i < spikes; i++) {
    const reach = 1.06 + 0.16 * ((i * 7) % 5) / 4; // uneven, and the same every time
    const [x, y] = i === nearest ? [balloon.tail.x, balloon.tail.y] : point(balloon, rx * reach, ry * reach, i * turn);
    const [ix, iy] = point(balloon, rx * 0.84, ry * 0.84, (i + 0.5) * turn);
    d += `${i === 0 ? "M" : "L"}${x} ${y}L${ix} ${iy}`;
  }
  return [`${d}Z`];
}

export function paintBalloon(context, balloon) {
  const shapes = shapesOf(balloon);
  context.save();
  context.translate(balloon.x, balloon.y);
  context.rotate((shapes.rotate * Math.PI) / 180);
  context.translate(-balloon.x, -balloon.y);
  context.lineJoin = "round";
  for (const { d, fill, stroke, width } of shapes.paths) {
    const path = new Path2D(d);
    context.fillStyle = fill;
    context.fill(path);
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.stroke(path);
  }
  context.font = shapes.font;
  context.textAlign = "center";
  for (const { text, x, y } of shapes.lines) {
    if (shapes.outline) {
      context.strokeStyle = INK;
      context.lineWidth = shapes.outline;
      context.strokeText(text, x, y);
    }
    context.fillStyle = shapes.fill;
    context.fillText(text, x, y);
  }
  context.restore();
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// The balloon as SVG, in page units; its words are text.
export function balloonElement(balloon) {
  const shapes = shapesOf(balloon);
  const group = svg("g", { class: "shape", transform: `rotate(${shapes.rotate} ${balloon.x} ${balloon.y})` });
  for (const { d, fill, stroke, width } of shapes.paths) {
    group.append(svg("path", { d, fill, stroke, "stroke-width": width, "stroke-linejoin": "round" }));
  }
  if (!shapes.paths.length) {
    const [x, y, width, height] = shapes.box;
    group.append(svg("rect", { x, y, width, height, fill: "transparent" })); // something to take hold of
  }
  for (const { text, x, y } of shapes.lines) {
    const line = svg("text", { x, y, class: balloon.kind === "effect" ? "effect" : "words", "font-size": balloon.size, fill: shapes.fill,
                               "text-anchor": "middle", ...(shapes.outline ? { stroke: INK, "stroke-width": shapes.outline } : {}) });
    line.textContent = text;
    group.append(line);
  }
  return { group, box: shapes.box };
}
