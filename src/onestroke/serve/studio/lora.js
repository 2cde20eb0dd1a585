// A LoRA of the server's for the chosen panel: which one, and how strongly it is drawn with.

const $ = (selector) => document.querySelector(selector);
const shown = (scale) => scale.toFixed(2);

export class LoraView {
  // `set(name, lora)` takes the panel's new {name, scale}, or null; `panel()` is the chosen one.
  constructor(models, set, panel) {
    Object.assign(this, { models, panel });
    $("#lora").addEventListener("change", ({ target }) => {
      set("LoRA", target.value ? { name: target.value, scale: this.panel().lora?.scale ?? 1 } : null);
    });
    $("#lora-scale").addEventListener("input", ({ target }) => {
      const { lora } = this.panel();
      if (lora) set("LoRA's strength", { ...lora, scale: Number(target.value) });
    });
  }

  // What the panel's model offers. A project may name one that this server does not have: that is said, and kept.
  render() {
    const { lora, model } = this.panel();
    const names = this.models.find(({ id }) => id === (model || this.models[0].id))?.loras ?? [];
    const missing = lora && !names.includes(lora.name) ? [[`${lora.name} (not on this server)`, lora.name]] : [];
    const choices = [["None", ""], ...names.map((name) => [name, name]), ...missing];
    $("#lora-area").hidden = choices.length === 1;
    if (this.choices !== JSON.stringify(choices)) $("#lora").replaceChildren(...choices.map(([text, value]) => new Option(text, value)));
    this.choices = JSON.stringify(choices);
    $("#lora").value = lora?.name ?? "";
    $("#lora-scale").disabled = !lora;
    $("#lora-scale").value = lora?.scale ?? 1;
    $("#lora-told").textContent = lora ? shown(lora.scale) : "";
  }
}
