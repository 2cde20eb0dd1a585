// Pictures by what they are drawn from. The same panel is the same picture, so undo shows it again without drawing.

const MOST = 320; // all panels of a project, and variants

// What a panel's picture depends on; `models` fills in the model that an empty name stands for.
export function keyOf(panel, defaultModel) {
  const sketch = panel.sketch ? `${digest(panel.sketch.image)}/${digest(panel.sketch.mask ?? "")}/${panel.sketch.strength}` : "";
  const lora = panel.lora ? [panel.lora.name, panel.lora.scale] : [];
  return JSON.stringify([panel.model || defaultModel, panel.prompt.trim(), panel.seed, panel.steps, sketch, ...lora]);
}

// FNV-1a over the text: tells sketches apart, no more.
function digest(content) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < content.length; i++) hash = Math.imul(hash ^ content.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(16) + content.length.toString(16);
}

export class Pictures {
  constructor() {
    this.kept = new Map(); // key -> {bitmap, blob, header}, oldest use first
  }

  has(key) {
    return this.kept.has(key);
  }

  get(key) {
    const found = this.kept.get(key);
    if (found) {
      this.kept.delete(key);
      this.kept.set(key, found);
    }
    return found;
  }

  async add(key, blob, header) {
    const picture = { bitmap: await createImageBitmap(blob), blob, header };
    this.kept.set(key, picture);
    while (this.kept.size > MOST) this.kept.delete(this.kept.keys().next().value);
    return picture;
  }
}

export function blobOf(address) {
  const [head, body] = address.split(",");
  const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

export async function addressOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let letters = "";
  for (let i = 0; i < bytes.length; i += 8192) letters += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return `data:${blob.type};base64,${btoa(letters)}`;
}

// Paint a picture into a frame. "fill" cuts it to the frame; "whole" shows all of it and carries its edges on, which is
// seamless for the flat backgrounds of comic characters.
export function paintPicture(context, picture, [x, y, width, height], fit) {
  const { width: w, height: h } = picture;
  context.save();
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  const scale = (fit === "fill" ? Math.max : Math.min)(width / w, height / h);
  const [sw, sh] = [w * scale, h * scale];
  const left = x + (width - sw) / 2;
  const top = fit === "fill" ? y + (height - sh) * 0.35 : y + (height - sh); // faces lie above the middle; feet stand
  if (fit !== "fill") {
    if (left > x) {
      context.drawImage(picture, 0, 0, 1, h, x, top, left - x + 1, sh);
      context.drawImage(picture, w - 1, 0, 1, h, left + sw - 1, top, left - x + 1, sh);
    }
    if (top > y) context.drawImage(picture, 0, 0, w, 1, left, y, sw, top - y + 1);
  }
  context.drawImage(picture, left, top, sw, sh);
  context.restore();
}
