// The picture or video that the next video starts from: chosen, dropped or pasted, and sent to the server in parts.

const PART_BYTES = 65536; // as many as the server takes in one message

const get = (id) => document.getElementById(id);

export class StartFrames {
  #send;
  #fail;
  #media = [];
  #maxBytes = 0;
  #coming = null; // the file that is sent or looked at: {name, blob, bytes, done}
  #removing = null; // called when it is done
  #file = null; // what the server has, as it was sent
  #words = ""; // what is said of it

  /** `send(message)` takes an object or bytes; `fail(words)` shows an error. */
  constructor(send, fail) {
    this.#send = send;
    this.#fail = fail;
    get("start-choose").addEventListener("click", () => get("start-file").click());
    get("start-remove").addEventListener("click", async () => {
      if (!this.ready()) return;
      await this.remove();
      get("start-choose").focus();
    });
    get("start-file").addEventListener("change", () => {
      const [file] = get("start-file").files;
      this.#take(file);
      // The same file may be chosen again.
      get("start-file").value = "";
    });
    // Wherever it is dropped: elsewhere the browser would leave the page for it.
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.#take(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData;
      // What word processors copy is text, and a picture of it.
      if (files.length === 0 || types.includes("text/plain")) return;
      event.preventDefault();
      this.#take(files[0]);
    });
  }

  /** Whether no file is on its way; else it says so. */
  ready() {
    const busy = this.#coming !== null || this.#removing !== null;
    if (busy) this.#fail("The file to start from is still on its way: wait for it.");
    return !busy;
  }

  get valid() {
    return get("strength-field").hidden || get("strength").reportValidity();
  }

  /** Null without a video to make anew. */
  get strength() {
    return get("strength-field").hidden || get("strength").value === "" ? null : get("strength").valueAsNumber;
  }

  set strength(strength) {
    get("strength").value = strength ?? "";
  }

  /** A server is there, and has no file yet. Ends when it has the one of before, if any. */
  async greet({ start_media: media, max_upload: maxBytes }) {
    const file = this.#coming ?? this.#file;
    [this.#media, this.#maxBytes] = [media, maxBytes];
    this.#coming = this.#removing = this.#file = null;
    get("start-frames").hidden = media.length === 0;
    get("start-file").accept = media.join();
    const kinds = media.some((name) => name.startsWith("image/")) ? "A picture or video" : "A video";
    get("start-help").textContent =
      `${kinds} of at most ${maxBytes / 2 ** 20} MB: choose, drop or paste it. It holds from the next start on.`;
    this.#show({ media: null });
    if (file && media.length) await this.put(file.blob, file.name);
  }

  /** Sends a file. Returns whether the server takes it. */
  async put(blob, name) {
    if (blob.size === 0 || blob.size > this.#maxBytes) {
      this.#fail(`${name}: it has ${blob.size} bytes; there may be ${this.#maxBytes}.`);
      return false;
    }
    const coming = { name, blob };
    this.#coming = coming;
    this.#say(`Sending ${name}`);
    try {
      coming.bytes = new Uint8Array(await blob.arrayBuffer());
    } catch (error) {
      this.#coming = null;
      this.#fail(`${name}: ${error.message}`);
      this.#say(this.#words);
      return false;
    }
    // Another connection has begun.
    if (this.#coming !== coming) return false;
    return new Promise((done) => {
      coming.done = done;
      this.#send({ type: "upload", bytes: blob.size });
    });
  }

  remove() {
    return new Promise((done) => {
      this.#removing = done;
      this.#send({ type: "remove" });
    });
  }

  /** Of a saved session: its file in place of what is there. Whether the server takes it. */
  async restore(uri) {
    if (uri === null) {
      if (this.#file) await this.remove();
      return true;
    }
    const [, type, text] = /^data:([a-z0-9/]+);base64,(.*)$/s.exec(uri) ?? [];
    if (text === undefined) throw new Error("start_frames is no data URI");
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return this.put(new Blob([bytes], { type }), "the session's file");
  }

  /** The server asks for the part from byte `start` on. */
  received({ bytes: start }) {
    const { name, bytes } = this.#coming;
    const part = bytes.subarray(start, start + PART_BYTES);
    this.#send(part);
    // Not of every part, for those who have it read to them.
    const percent = 25 * Math.floor((4 * (start + part.length)) / bytes.length);
    this.#say(percent < 100 ? `Sending ${name}: ${percent} %` : `Looking at ${name}`);
  }

  /** What the server has now, after a file or the end of one. */
  told(message) {
    const coming = this.#coming;
    if (message.error !== null) this.#fail(`${coming.name}: ${message.error}`);
    else this.#file = coming;
    if (message.media === null) this.#file = null;
    this.#coming = null;
    this.#show(message);
    coming?.done(message.error === null);
    this.#removing?.();
    this.#removing = null;
  }

  #take(file) {
    // It was text, or the model starts from nothing.
    if (file && this.#media.length > 0 && this.ready()) this.put(file, file.name);
  }

  #show({ media, frames, thumbnail }) {
    const picture = get("start-picture");
    picture.hidden = get("start-remove").hidden = media === null;
    get("strength-field").hidden = media === null || media.startsWith("image/");
    if (media === null) {
      picture.removeAttribute("src");
      this.#words = "";
    } else {
      picture.src = thumbnail;
      picture.alt = `The first frame of ${this.#file.name}`;
      this.#words = `${this.#file.name}: ${frames === 1 ? "a picture" : `its first ${frames} frames`}`;
    }
    this.#say(this.#words);
  }

  #say(words) {
    if (get("start-state").textContent !== words) get("start-state").textContent = words;
  }
}
