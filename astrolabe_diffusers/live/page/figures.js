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
  #made = []; // [frames, seconds]

  constructor(frameRate) {
    this.#frameRate = frameRate;
    onScreen("made", "–");
    onScreen("latency", "–");
  }

  /** Whether the model makes fewer frames a second than are shown in one. */
  get slow() {
    return this.#made.length > 0 && this.#speed() < this.#frameRate;
  }

  #speed() {
    const [frames, seconds] = this.#made.reduce(([f, s], [frames, seconds]) => [f + frames, s + seconds], [0, 0]);
    return frames / seconds;
  }

  block({ frames, seconds, lane, memory_gb: memory }) {
    // Two lanes are made one after the other, and shown together.
    if (lane > 0) this.#made.at(-1)[1] += seconds;
    else this.#made = [...this.#made, [frames, seconds]].slice(-BLOCKS);
    onScreen("made", `${this.#speed().toFixed(1)} frames/s`);
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
