// Pictures onto the canvases at the model's frame rate: each once and in order, none made up, none left out in secret.

// A screen is drawn every 16 ms or sooner, and half of that early is as near as half of it late.
const EARLY_MS = 4;

/**
 * `canvases`, one a lane, show the same frame at the same time. `watcher` has `shown(frame)`, `underrun(frame)` and
 * `passed(frame)`: the last one of those that were skipped, with nothing behind them yet.
 *
 * When a frame is due and not there, the picture holds and that is one underrun, however long it lasts. Frames that
 * the server did not send, or that cannot be decoded, are skipped and counted in `lost`.
 */
export class Playout {
  underruns = 0;
  lost = 0;
  next = 0; // the frame that is shown next
  #contexts;
  #period;
  #watcher;
  #bitmaps = new Map(); // frame -> one bitmap a lane
  #ends; // of each lane, the frame after the last that has arrived
  #gaps = []; // [first, end) of frames that will not arrive
  #due = null; // the time at which `next` is due; null: as soon as it is there
  #dry = false;
  #running = false;
  #finished = false;
  #request = 0;

  constructor(canvases, frameRate, watcher) {
    this.#contexts = canvases.map((canvas) => canvas.getContext("2d", { alpha: false }));
    this.#ends = canvases.map(() => 0);
    this.#period = 1000 / frameRate;
    this.#watcher = watcher;
  }

  /** Frames that have arrived and are not shown yet. */
  get buffered() {
    return Math.max(0, Math.min(...this.#ends) - this.next);
  }

  /** The picture of a frame has arrived and is about to be decoded. */
  expect(lane, frame) {
    if (frame > this.#ends[lane]) this.#gaps.push([this.#ends[lane], frame]);
    this.#ends[lane] = frame + 1;
  }

  /** A frame that has arrived cannot be decoded. */
  lose(frame) {
    this.#gaps.push([frame, frame + 1]);
  }

  add(lane, frame, bitmap) {
    if (frame < this.next) {
      bitmap.close();
      return;
    }
    const lanes = this.#bitmaps.get(frame) ?? [];
    lanes[lane] = bitmap;
    this.#bitmaps.set(frame, lanes);
  }

  play() {
    if (this.#running) return;
    this.#running = true;
    this.#due = null;
    this.#request = requestAnimationFrame((now) => this.#tick(now));
  }

  hold() {
    this.#running = false;
    cancelAnimationFrame(this.#request);
  }

  /** Nothing more will arrive. */
  finish() {
    this.#finished = true;
  }

  close() {
    this.hold();
    this.next = Infinity;
    this.#bitmaps.forEach((lanes) => lanes.forEach((bitmap) => bitmap.close()));
    this.#bitmaps.clear();
  }

  #tick(now) {
    this.#request = requestAnimationFrame((later) => this.#tick(later));
    if (this.#due !== null && now < this.#due - EARLY_MS) return;
    const before = this.next;
    this.#skipGaps();
    const lanes = this.#bitmaps.get(this.next);
    if (!lanes || Object.keys(lanes).length < this.#contexts.length) {
      // The server makes no more than is seen or passed.
      if (this.next > before && this.buffered === 0) this.#watcher.passed(this.next - 1);
      // Before the first frame and after the last there is nothing to run dry.
      if (this.#due !== null && !this.#dry && !this.#finished) {
        this.#dry = true;
        this.underruns++;
        this.#watcher.underrun(this.next);
      }
      return;
    }
    lanes.forEach((bitmap, lane) => {
      this.#contexts[lane].drawImage(bitmap, 0, 0);
      bitmap.close();
    });
    this.#bitmaps.delete(this.next);
    // After a stall the clock starts anew: late frames are not hurried through.
    const late = this.#due === null || this.#dry || now - this.#due > this.#period;
    this.#due = (late ? now : this.#due) + this.#period;
    this.#dry = false;
    this.#watcher.shown(this.next++);
  }

  #skipGaps() {
    let i;
    while ((i = this.#gaps.findIndex(([first]) => first <= this.next)) >= 0) {
      const [[, end]] = this.#gaps.splice(i, 1);
      for (; this.next < end; this.next++) {
        this.lost++;
        this.#bitmaps.get(this.next)?.forEach((bitmap) => bitmap.close());
        this.#bitmaps.delete(this.next);
      }
    }
  }
}
