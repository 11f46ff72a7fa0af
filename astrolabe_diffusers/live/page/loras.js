// A slider and a switch for each LoRA that the server has loaded.

const HIGHEST = 2;

/** `changed(weights)`, of one LoRA, is called when somebody moves its slider; one that is switched off has weight 0. */
export class Loras {
  #list;
  #changed;
  #controls = new Map(); // name -> {on, slider, value, strength}: a slider has but some of all numbers
  #loaded = {};

  constructor(list, changed) {
    this.#list = list;
    this.#changed = changed;
  }

  /** `weights` of the LoRAs as they were loaded, by name. What somebody has set stays set. */
  load(weights) {
    const before = this.weights;
    this.#loaded = weights;
    this.#controls.clear();
    this.#list.replaceChildren(...Object.entries(weights).map(([name, weight]) => this.#row(name, weight)));
    this.show(before);
  }

  get weights() {
    const entries = [...this.#controls].map(([name, { on, strength }]) => [name, on.checked ? strength : 0]);
    return Object.fromEntries(entries);
  }

  /** What a session has to begin with so that it has these weights, not those that were loaded. */
  get events() {
    const moved = Object.entries(this.weights).filter(([name, weight]) => weight !== this.#loaded[name]);
    return moved.length ? [{ block: 0, type: "lora", weights: Object.fromEntries(moved) }] : [];
  }

  /** To the weights of a session or an event. */
  show(weights) {
    for (const [name, weight] of Object.entries(weights)) {
      if (!this.#controls.has(name)) continue;
      const control = this.#controls.get(name);
      control.on.checked = weight !== 0;
      if (weight !== 0) place(control, weight);
    }
  }

  #row(name, weight) {
    const row = document.createElement("div");
    row.className = "lora";
    const on = input("checkbox", `lora-on-${name}`);
    const slider = input("range", `lora-${name}`);
    const value = document.createElement("output");
    const control = { on, slider, value };
    const label = document.createElement("label");
    label.htmlFor = on.id;
    label.textContent = name;
    slider.setAttribute("aria-label", `Strength of ${name}`);
    Object.assign(slider, { min: Math.min(0, 2 * weight), max: Math.max(HIGHEST, 2 * weight), step: 0.05 });
    value.htmlFor = slider.id;
    on.checked = weight !== 0;
    place(control, weight);
    const changed = () => this.#changed({ [name]: this.weights[name] });
    on.addEventListener("change", changed);
    slider.addEventListener("input", () => {
      value.textContent = Number(slider.value).toFixed(2);
    });
    // When the slider is let go or stepped: not for every pixel that it is dragged over.
    slider.addEventListener("change", () => {
      on.checked = true;
      control.strength = Number(slider.value);
      changed();
    });
    row.append(on, label, slider, value);
    this.#controls.set(name, control);
    return row;
  }
}

/** Puts a slider to a weight, as near as it has one, and makes it longer where it ends before. */
function place(control, weight) {
  const { slider, value } = control;
  slider.min = Math.min(slider.min, weight);
  slider.max = Math.max(slider.max, weight);
  slider.value = weight;
  control.strength = weight;
  value.textContent = weight.toFixed(2);
}

function input(type, id) {
  const element = document.createElement("input");
  return Object.assign(element, { type, id });
}
