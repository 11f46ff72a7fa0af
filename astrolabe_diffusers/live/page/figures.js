// The figures under the timeline.

const SHOWN_MS = 2000; // over which shown frames are counted
const BLOCKS = 4; // over which made ones are

const onScreen = (id, text) => {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
};

export class Figures {
  #frameRate;
  #shown = []; // times
  #made = []; // {frames, seconds, turn}

  constructor(frameRate) {
    this.#frameRate = frameRate;
    onScreen("made", "–");
    onScreen("latency", "–");
  }

  /** Whether fewer frames a second are made for this page, in turns with others, than are shown in one. */
  get slow() {
    return this.#made.length > 0 && this.#speed("turn") < this.#frameRate;
  }

  #speed(time) {
    const sum = (name) => this.#made.reduce((total, block) => total + block[name], 0);
    return sum("frames") / sum(time);
  }

  block({ frames, seconds, turn_seconds: turn, lane, memory_gb: memory }) {
    // Two lanes are made one after the other, and shown together.
    if (lane > 0) this.#made.at(-1).seconds += seconds;
    else this.#made = [...this.#made, { frames, seconds, turn }].slice(-BLOCKS);
    onScreen("made", `${this.#speed("seconds").toFixed(1)} frames/s`);
    onScreen("memory", `${memory.toFixed(2)} GB`);
  }

  show() {
    this.#shown.push(performance.now());
  }

  latency(milliseconds) {
    onScreen("latency", `${milliseconds} ms`);
  }

  queue(text) {
    onScreen("queue", text);
  }

  update({ buffered, underruns, lost }) {
    const now = performance.now();
    this.#shown = this.#shown.filter((time) => now - time < SHOWN_MS);
    onScreen("shown", `${((this.#shown.length * 1000) / SHOWN_MS).toFixed(1)} of ${this.#frameRate} frames/s`);
    onScreen("buffer", `${buffered} frames`);
    onScreen("underruns", `${underruns}`);
    onScreen("lost", `${lost}`);
  }
}
