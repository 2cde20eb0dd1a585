// Sketch to panel: draw or paste, and the panel is redrawn from it as the pen moves; a mask limits where.

const SIDE = 512;
const UNDO = 40;
const THROTTLE_MS = 90;

export class Sketch extends EventTarget {
  // `dialog` holds the elements named below; "change" tells of {image, mask, strength}, "keep" and "remove" end it.
  constructor(dialog) {
    super();
    this.dialog = dialog;
    const find = (name) => dialog.querySelector(`[data-sketch="${name}"]`);
    [this.canvas, this.maskCanvas, this.strength, this.width, this.color, this.result] =
      ["canvas", "mask", "strength", "width", "color", "result"].map(find);
    for (const canvas of [this.canvas, this.maskCanvas]) canvas.width = canvas.height = SIDE;
    this.tool = "pen";
    for (const button of dialog.querySelectorAll("[data-tool]")) button.addEventListener("click", () => this._take(button.dataset.tool));
    this.strength.addEventListener("input", () => this._changed());
    this.maskCanvas.addEventListener("pointerdown", (event) => this._stroke(event));
    find("undo").addEventListener("click", () => this._undo());
    find("clear").addEventListener("click", () => this._clear());
    find("file").addEventListener("change", (event) => this._load(event.target.files[0]));
    find("keep").addEventListener("click", () => this._end("keep"));
    find("remove").addEventListener("click", () => this._end("remove"));
    dialog.addEventListener("cancel", (event) => { event.preventDefault(); this._end("keep"); });
    dialog.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
      if (file) this._load(file);
    });
  }

  // Begin with the panel's sketch, or else with its picture (a bitmap, or null for white paper).
  async open(sketch, bitmap) {
    this.steps = [];
    this.hasMask = false;
    const ink = this.canvas.getContext("2d");
    ink.fillStyle = "#ffffff";
    ink.fillRect(0, 0, SIDE, SIDE);
    this.maskCanvas.getContext("2d").clearRect(0, 0, SIDE, SIDE);
    if (sketch) {
      ink.drawImage(await imageOf(sketch.image), 0, 0, SIDE, SIDE);
      if (sketch.mask) {
        this.hasMask = true;
        tint(this.maskCanvas.getContext("2d"), await imageOf(sketch.mask));
      }
      this.strength.value = sketch.strength;
    } else if (bitmap) {
      ink.drawImage(bitmap, 0, 0, SIDE, SIDE);
    }
    this._take("pen");
    this.dialog.showModal();
  }

  show(bitmap) {
    const { result } = this;
    result.width = bitmap.width;
    result.height = bitmap.height;
    result.getContext("2d").drawImage(bitmap, 0, 0);
  }

  _take(tool) {
    this.tool = tool;
    for (const button of this.dialog.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  }

  _stroke(event) {
    event.preventDefault();
    this._remember();
    const isMask = this.tool === "mask";
    const context = (isMask ? this.maskCanvas : this.canvas).getContext("2d");
    if (isMask) this.hasMask = true;
    const at = ({ clientX, clientY }) => {
      const box = this.maskCanvas.getBoundingClientRect();
      return [((clientX - box.left) * SIDE) / box.width, ((clientY - box.top) * SIDE) / box.height];
    };
    let from = at(event);
    const line = (to) => {
      context.lineWidth = Number(this.width.value) * (this.tool === "pen" ? 1 : 3);
      context.lineCap = context.lineJoin = "round";
      context.strokeStyle = { pen: this.color.value, eraser: "#ffffff", mask: MASK_COLOR }[this.tool];
      context.beginPath();
      context.moveTo(...from);
      context.lineTo(to[0] + 0.01, to[1]);
      context.stroke();
      from = to;
      this._changed();
    };
    line(from);
    const move = (next) => line(at(next));
    const end = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", end);
      this._changed();
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", end);
  }

  _remember() {
    const copy = (canvas) => canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
    this.steps.push([copy(this.canvas), copy(this.maskCanvas), this.hasMask]);
    if (this.steps.length > UNDO) this.steps.shift();
  }

  _undo() {
    const step = this.steps.pop();
    if (!step) return;
    this.canvas.getContext("2d").putImageData(step[0], 0, 0);
    this.maskCanvas.getContext("2d").putImageData(step[1], 0, 0);
    this.hasMask = step[2];
    this._changed();
  }

  _clear() {
    this._remember();
    const ink = this.canvas.getContext("2d");
    ink.fillStyle = "#ffffff";
    ink.fillRect(0, 0, SIDE, SIDE);
    this.maskCanvas.getContext("2d").clearRect(0, 0, SIDE, SIDE);
    this.hasMask = false;
    this._changed();
  }

  async _load(file) {
    if (!file) return;
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      this.dispatchEvent(new CustomEvent("fault", { detail: "This file is no picture." }));
      return;
    }
    this._remember();
    const scale = Math.max(SIDE / bitmap.width, SIDE / bitmap.height);
    const [width, height] = [bitmap.width * scale, bitmap.height * scale];
    this.canvas.getContext("2d").drawImage(bitmap, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    this._changed();
  }

  // At most one change in THROTTLE_MS, the last one always told.
  _changed() {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = null;
      this.dispatchEvent(new CustomEvent("change", { detail: this.value() }));
    }, THROTTLE_MS);
  }

  value() {
    const mask = this.hasMask ? blackAndWhite(this.maskCanvas).toDataURL("image/png") : null;
    return { image: this.canvas.toDataURL("image/png"), mask, strength: Number(this.strength.value) };
  }

  _end(what) {
    clearTimeout(this.timer);
    this.timer = null;
    this.dialog.close();
    this.dispatchEvent(new CustomEvent(what, { detail: what === "keep" ? this.value() : null }));
  }
}

const MASK_COLOR = "#e0452c";

async function imageOf(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

// White where the mask was brushed, on black: what the server redraws.
function blackAndWhite(canvas) {
  const copy = document.createElement("canvas");
  copy.width = copy.height = SIDE;
  const context = copy.getContext("2d");
  const pixels = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 0 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return copy;
}

function tint(context, image) {
  context.drawImage(image, 0, 0, SIDE, SIDE);
  const pixels = context.getImageData(0, 0, SIDE, SIDE);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i] > 127;
    pixels.data.set(on ? [224, 69, 44, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
}
