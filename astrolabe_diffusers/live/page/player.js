// One session on the screen: from its pictures to the canvases, its marks and its figures.

import { newDecoder } from "./decoding.js";
import { Figures } from "./figures.js";
import { Playout } from "./playout.js";
import { Timeline } from "./timeline.js";

const get = (id) => document.getElementById(id);

export class Player {
  figures;
  #timeline;
  #playout;
  #decoders;
  #shown; // the page's, called with every frame
  #screen = -1; // the frame that is on the screen
  #blocks = new Map(); // block -> its frames, {first, end}, and of the first one that was shown {frame, time}; in order
  #sent = []; // events that have not taken hold
  #held = []; // {sent, mark}, of which no frame is shown yet

  /** `started` is the server's message; `shown(frame)` is called once for each frame on the screen. */
  constructor(canvases, frameRate, started, shown, fail) {
    for (const canvas of canvases) Object.assign(canvas, { width: started.width, height: started.height });
    this.figures = new Figures(frameRate);
    this.#shown = shown;
    this.#timeline = new Timeline(get("strip"), get("track"), get("log"), frameRate);
    this.#playout = new Playout(canvases, frameRate, {
      shown: (frame) => this.#show(frame),
      underrun: (frame) => this.#timeline.underrun(frame),
      passed: (frame) => this.#shown(frame),
    });
    this.#decoders = canvases.map((_, lane) => newDecoder(started, {
      picture: (frame, bitmap) => this.#playout.add(lane, frame, bitmap),
      lost: (frame, error) => {
        this.#playout.lose(frame);
        fail(error);
      },
    }));
  }

  play() {
    this.#playout.play();
  }

  hold() {
    this.#playout.hold();
  }

  /** No more blocks will come: what is there is played to its end. */
  finish() {
    this.#playout.finish();
  }

  close() {
    this.#playout.close();
    for (const decoder of this.#decoders) decoder.close();
  }

  block(message) {
    this.figures.block(message);
    // Of both lanes, for a block of one may come without the other's.
    const { block, first_frame: first, frames } = message;
    for (const [number, { end }] of this.#blocks) if (end <= this.#screen) this.#blocks.delete(number);
    this.#blocks.set(block, { first, end: first + frames, shown: null });
    if (message.lane > 0) return;
    this.#timeline.block(message);
    this.#write();
  }

  picture({ lane, block, frame, data }) {
    const { first, end } = this.#blocks.get(block);
    this.#playout.expect(lane, frame);
    this.#decoders[lane].decode(frame, data, { begins: frame === first, ends: frame === end - 1 });
  }

  /** An event is being sent. */
  send(event) {
    const frame = Math.max(0, this.#screen);
    this.#sent.push({ event, frame, time: performance.now() });
    this.#timeline.send(frame);
  }

  /** The server says from which block on an event holds, and those of its type that were sent before. */
  mark(mark) {
    const sent = this.#sent.find(({ event }) => event.id === mark.id);
    this.#sent = this.#sent.filter(({ event }) => event.type !== mark.event.type || event.id > mark.id);
    this.#held.push({ sent, mark });
    this.#write();
  }

  update() {
    this.figures.update(this.#playout);
  }

  #show(frame) {
    this.#screen = frame;
    const block = [...this.#blocks.values()].find(({ end }) => frame < end);
    block.shown ??= { frame, time: performance.now() };
    this.figures.show();
    this.#timeline.show(frame);
    this.#shown(frame);
    if (this.#held.length) this.#write();
  }

  /** Marks of which a frame has been shown: of their block, or of a later one if that is lost. */
  #write() {
    this.#held = this.#held.filter(({ sent, mark }) => {
      const [, block] = [...this.#blocks].find(([number, { shown }]) => number >= mark.block && shown) ?? [];
      if (!block) return true;
      const { frame, time } = block.shown;
      const words = `Block ${mark.block}: ${describe(mark.event)}`;
      if (sent) {
        const ready = Math.round(1000 * mark.seconds);
        const delay = Math.round(time - sent.time);
        const when = `sent before block ${mark.sent_after_block + 1}, ready after ${ready} ms, seen after ${delay} ms`;
        this.#timeline.hold(frame, `${words}; ${when}.`, delay, sent);
        if (mark.event.type === "prompt") this.figures.latency(delay);
      } else {
        // It is of a session that is replayed, or was sent while another video was seen.
        this.#timeline.hold(frame, `${words}.`);
      }
      return false;
    });
  }
}

function describe({ type, prompt, transition, num_blocks: blocks, weights }) {
  if (type === "lora") {
    return `LoRA ${Object.entries(weights).map(([name, weight]) => `${name} at ${weight}`).join(", ")}`;
  }
  return `“${prompt}”, ${transition}${blocks > 1 ? ` over ${blocks} blocks` : ""}`;
}
