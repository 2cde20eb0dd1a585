// Student and teacher side by side: the same prompt and seed under a slider.

export class Compare {
  constructor(dialog, history, desk, models) {
    Object.assign(this, { dialog, history, desk, models });
    const find = (name) => dialog.querySelector(`[data-compare="${name}"]`);
    [this.student, this.teacher, this.slider, this.state, this.keep] = ["student", "teacher", "slider", "state", "keep"].map(find);
    this.slider.addEventListener("input", () => this._cut());
    this.keep.addEventListener("click", () => this._keep());
    find("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => desk.live.cancel("compare"));
    desk.addEventListener("picture", ({ detail }) => detail.compare && this._show());
    desk.addEventListener("fault", () => this._show());
  }

  open(index) {
    const other = this.models[1];
    const panel = this.history.page.panels[index];
    this.index = index;
    const lora = other.loras.includes(panel.lora?.name) ? panel.lora : null; // the teacher may not have it
    this.refined = { ...panel, model: other.id, steps: other.steps, lora };
    this.key = this.desk.keyOfPanel(this.refined);
    this.plain = panel.model ? { ...panel, model: "", steps: 1 } : panel;
    this.plainKey = this.desk.keyOfPanel(this.plain);
    this.dialog.querySelector("[data-compare=names]").textContent = `Left: ${this.models[0].id}, ${this.plain.steps} ${this.plain.steps === 1 ? "step" : "steps"}. Right: ${other.id}, ${other.steps} steps.`;
    if (!this.desk.pictures.has(this.key)) this.desk.draw("compare", this.refined, { key: this.key, compare: true });
    if (!this.desk.pictures.has(this.plainKey)) this.desk.draw("compare student", this.plain, { key: this.plainKey, compare: true });
    this.slider.value = 50;
    this._cut();
    this._show();
    this.dialog.showModal();
  }

  _show() {
    const pictures = [[this.student, this.plainKey], [this.teacher, this.key]].map(([canvas, key]) => {
      const picture = this.desk.pictures.get(key);
      canvas.hidden = !picture;
      if (!picture) return false;
      canvas.width = picture.bitmap.width;
      canvas.height = picture.bitmap.height;
      canvas.getContext("2d").drawImage(picture.bitmap, 0, 0);
      return true;
    });
    this.state.textContent = pictures.every(Boolean) ? "" : "Drawing…";
    this.keep.disabled = !pictures[1];
  }

  _cut() {
    this.teacher.style.clipPath = `inset(0 0 0 ${this.slider.value}%)`;
  }

  _keep() {
    this.history.settle();
    this.history.panel(this.index, "keep the teacher's picture", { model: this.refined.model, steps: this.refined.steps, lora: this.refined.lora });
    this.dialog.close();
  }
}
