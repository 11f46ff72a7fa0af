// Where a prompt was sent, where it took hold and how long that took: as a strip, and in words.

const SECONDS = 15; // of the strip
const MADE = 0.85; // of the strip, behind which a label has room
const LINES = 50; // of the log

export class Timeline {
  #strip;
  #track;
  #log;
  #span;
  #now = 0;
  #end = 0;

  constructor(strip, track, log, frameRate) {
    this.#strip = strip;
    this.#track = track;
    this.#log = log;
    this.#span = SECONDS * frameRate;
    track.replaceChildren();
    log.replaceChildren();
    strip.style.setProperty("--span", this.#span);
    this.#move();
  }

  /** `frame` is on the screen. */
  show(frame) {
    this.#now = frame;
    this.#move();
  }

  block({ block, first_frame: first, frames }) {
    this.#end = first + frames;
    const element = this.#add("block", first, frames);
    element.classList.toggle("odd", block % 2 === 1);
    this.#move();
  }

  underrun(frame) {
    this.#add("underrun", frame);
    this.#write(`The buffer ran dry before frame ${frame}.`);
  }

  /** An event was sent while `frame` was on the screen. */
  send(frame) {
    this.#add("sent", frame);
  }

  /** An event takes hold at `frame`, the first of a block; a `sent` one is seen `milliseconds` after it was sent. */
  hold(frame, words, milliseconds, sent) {
    if (sent) this.#add("span", sent.frame, frame - sent.frame);
    this.#add("hold", frame).dataset.label = sent ? `${milliseconds} ms` : "";
    this.#write(words);
  }

  #write(words) {
    const line = document.createElement("li");
    line.textContent = words;
    this.#log.append(line);
    if (this.#log.childElementCount > LINES) this.#log.firstChild.remove();
    this.#log.scrollTop = this.#log.scrollHeight;
  }

  #add(kind, frame, frames = 0) {
    const element = document.createElement("span");
    element.className = kind;
    element.style.setProperty("--frame", frame);
    element.style.setProperty("--frames", frames);
    this.#track.append(element);
    return element;
  }

  #move() {
    const start = Math.max(0, this.#end - MADE * this.#span);
    this.#strip.style.setProperty("--start", start);
    this.#strip.style.setProperty("--now", this.#now);
    for (const element of [...this.#track.children]) {
      const { style } = element;
      if (Number(style.getPropertyValue("--frame")) + Number(style.getPropertyValue("--frames")) >= start) continue;
      element.remove();
    }
  }
}
