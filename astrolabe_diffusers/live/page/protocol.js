// What goes over the WebSocket: JSON both ways, pictures from the server. docs/live.md has the messages.

const VERSION = 1;
const HEADER_BYTES = 12;

/** The picture of a frame: `{lane, block, frame, data}`, `data` a `Uint8Array`. */
export function unpackPicture(buffer) {
  const view = new DataView(buffer);
  const version = view.getUint8(0);
  if (version !== VERSION) {
    throw new Error(`the server speaks version ${version}, this page ${VERSION}: reload the page`);
  }
  return {
    lane: view.getUint8(1),
    block: view.getUint32(4, true),
    frame: view.getUint32(8, true),
    data: new Uint8Array(buffer, HEADER_BYTES),
  };
}

/** The page's token, which the WebSocket and downloads need too. */
function withToken(url) {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const token = new URLSearchParams(location.search).get("token") ?? fragment.get("token");
  if (token !== null) url.searchParams.set("token", token);
  return url;
}

export function downloadAddress(path) {
  return withToken(new URL(path, location.href.split("#")[0])).href;
}

function socketAddress() {
  const url = new URL("ws", location.href.split("#")[0].split("?")[0]);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  return withToken(url).href;
}

// A policy that was violated, and a message that is too long: it would be again.
const FINAL_CODES = [1008, 1009];
const RETRY_MS = [500, 1000, 2000, 4000];

/**
 * A WebSocket that comes back after its server does. `receiver` has `message(object)`, `picture(ArrayBuffer)`,
 * `lost()` and `refused(reason)`; a connection that the server refuses is not tried again.
 */
export class Connection {
  #receiver;
  #socket;
  #failures = 0;

  constructor(receiver) {
    this.#receiver = receiver;
    this.#open();
  }

  #open() {
    this.#socket = new WebSocket(socketAddress());
    this.#socket.binaryType = "arraybuffer";
    this.#socket.addEventListener("message", ({ data }) => {
      this.#failures = 0;
      if (typeof data === "string") this.#receiver.message(JSON.parse(data));
      else this.#receiver.picture(data);
    });
    this.#socket.addEventListener("close", ({ code, reason }) => {
      if (FINAL_CODES.includes(code)) {
        this.#receiver.refused(reason || `code ${code}`);
        return;
      }
      this.#receiver.lost();
      const wait = RETRY_MS[Math.min(this.#failures++, RETRY_MS.length - 1)];
      setTimeout(() => this.#open(), wait);
    });
  }

  /** `message` is an object or bytes. */
  send(message) {
    if (this.#socket.readyState !== WebSocket.OPEN) return;
    this.#socket.send(message instanceof Uint8Array ? message : JSON.stringify(message));
  }
}
