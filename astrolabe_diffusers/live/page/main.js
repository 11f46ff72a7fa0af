// The page: what is typed and pressed, and what the server says.

import { decodableCodecs } from "./decoding.js";
import { Loras } from "./loras.js";
import { Player } from "./player.js";
import { Connection, downloadAddress, unpackPicture } from "./protocol.js";
import { StartFrames } from "./start_frames.js";

const get = (id) => document.getElementById(id);
const UPDATE_MS = 250; // between two looks at the figures
const BACK_MS = 5000; // for which the page says that the server is back

const codecs = await decodableCodecs();
let hello = null; // what the server has; null while there is no connection
let player = null;
const starts = new Map(); // of this connection, by number from 1 on: {message, weights} as they were sent
let numStarts = 0;
let numEvents = 0;
let accepted = null; // the start of the session that runs or waits
let shownStart = 0; // the number of the start whose video the player has
let sessionUrl = null; // of that one, while this connection lasts
let waiting = null; // the place in the queue
let running = false;
let paused = false;
let recording = false;
let ended = null; // why the last session did
let trouble = null; // why there is no connection
let cameBack = false;

const loras = new Loras(get("lora-list"), steerLoras);

const startFrames = new StartFrames((message) => connection.send(message), showError);

const receiver = {
  message(message) {
    receive[message.type](message);
    describe();
  },
  picture(buffer) {
    player.picture(unpackPicture(buffer));
  },
  lost() {
    disconnected("No connection to the server; trying again.");
  },
  refused(reason) {
    disconnected(`The server closed the connection: ${reason}`);
  },
};

// What the server says, by the type of its message.
const receive = {
  hello(message) {
    hello = message;
    sessionUrl = null;
    starts.clear();
    numStarts = 0;
    if (trouble !== null) sayThatItIsBack();
    trouble = null;
    get("model").textContent = message.model;
    get("transition").replaceChildren(...message.transitions.map((name) => new Option(name)));
    showPresets(message.presets);
    get("num-blocks").max = message.max_transition_blocks;
    loras.load(message.loras);
    get("loras").hidden = Object.keys(message.loras).length === 0;
    get("prompt").value ||= message.presets[0] ?? "";
    get("width").value ||= message.width;
    get("height").value ||= message.height;
    if (player === null) setAspect(message);
    // The session goes on with what was on.
    const again = accepted;
    startFrames.greet(message).then(() => {
      if (again) start({ ...again, replay: false, events: loras.events });
    });
  },
  queue({ position, sessions, start: number }) {
    // Those before are over, and those between were refused.
    for (const other of starts.keys()) if (other < number) starts.delete(other);
    accepted = starts.get(number).message;
    waiting = position > 0 ? position : null;
    const places = `${sessions} ${sessions === 1 ? "session" : "sessions"} at once`;
    get("queue").textContent = waiting ? `place ${position}, ${places}` : "running";
  },
  started(message) {
    player?.close();
    const canvases = [get("lane-0"), get("lane-1")].slice(0, message.compare ? 2 : 1);
    get("second").hidden = canvases.length < 2;
    get("stage").dataset.lanes = canvases.length;
    setAspect(message);
    shownStart = message.start;
    sessionUrl = message.session_url;
    const shown = (frame) => sendOfThis({ type: "shown", frame });
    player = new Player(canvases, hello.frame_rate, message, shown, (error) => showError(error.message));
    get("seed").value = message.seed;
    showPrompt(accepted.prompt);
    running = true;
    waiting = ended = null;
    paused = false;
    playOrHold();
    // What was moved while it was on its way, or waited.
    const { weights } = starts.values().next().value;
    const moved = Object.entries(loras.weights).filter(([name, weight]) => weight !== weights[name]);
    if (accepted.replay) loras.show({ ...message.loras, ...Object.fromEntries(moved) });
    if (moved.length) steerLoras(Object.fromEntries(moved));
  },
  block(message) {
    player.block(message);
  },
  mark(message) {
    player.mark(message);
    if (message.event.type === "lora") {
      // Ours are where they were moved to, perhaps further by now; others are of a session that is replayed.
      if (message.id === null) loras.show(message.event.weights);
    } else {
      // If the server goes and comes back, the session goes on with this.
      accepted = { ...accepted, prompt: message.event.prompt };
      showPrompt(message.event.prompt);
    }
  },
  recording({ on, url, frames }) {
    recording = on;
    if (url !== null) offer(downloadAddress(url), `video of ${frames} frames`);
  },
  received(message) {
    startFrames.received(message);
  },
  start_frames(message) {
    startFrames.told(message);
  },
  ended({ reason }) {
    running = false;
    waiting = accepted = null;
    ended = reason;
    player?.finish();
  },
  error({ message }) {
    showError(message);
  },
};

function sayThatItIsBack() {
  cameBack = true;
  setTimeout(() => {
    cameBack = false;
    describe();
  }, BACK_MS);
}

function disconnected(words) {
  hello = waiting = null;
  running = recording = false;
  trouble = words;
  player?.finish();
  describe();
}

// What is sent.

function start(message) {
  starts.set(++numStarts, { message, weights: loras.weights });
  connection.send(message);
}

function startAnew() {
  const fields = ["prompt", "seed", "width", "height"].map(get);
  if (!fields.every((field) => field.reportValidity()) || !startFrames.valid || !startFrames.ready()) return;
  const number = (id) => get(id).valueAsNumber;
  start({
    type: "start",
    prompt: get("prompt").value,
    seed: number("seed"),
    height: number("height"),
    width: number("width"),
    codecs,
    compare: get("compare").checked,
    strength: startFrames.strength,
    events: loras.events,
  });
}

/** The server checks that it is one of this model and its LoRAs. */
async function replay(file) {
  if (!startFrames.ready() || !(await startFrames.put(file, file.name, "session"))) return;
  const { prompt, seed, height, width, compare = false, strength = null } = JSON.parse(await file.text());
  startFrames.strength = strength;
  get("prompt").value = prompt;
  for (const [name, value] of Object.entries({ seed, height, width })) get(name).value = value;
  get("compare").checked = compare;
  start({ type: "start", replay: true, prompt, seed, height, width, codecs, compare, strength });
}

/** About the video that is shown. Another one may be there by the time at which it comes. */
function sendOfThis(message) {
  connection.send({ ...message, start: shownStart });
}

function steer(event, send) {
  if (!running) return;
  const numbered = { ...event, id: ++numEvents };
  player.send(numbered);
  send(numbered);
}

function steerLoras(weights) {
  // A video that comes meanwhile is told of them when it is there.
  steer({ type: "lora", weights }, sendOfThis);
}

function sendPrompt() {
  if (!running) {
    startAnew();
    return;
  }
  const transition = get("transition").value;
  const prompt = get("prompt").value;
  const blocks = transition === "roll" ? get("num-blocks").valueAsNumber : 1;
  // It is for the newest video, also for one that is on its way.
  steer({ type: "prompt", prompt, transition, num_blocks: blocks }, (event) => connection.send(event));
}

function pause() {
  if (!running) return;
  paused = !paused;
  sendOfThis({ type: paused ? "pause" : "resume" });
  playOrHold();
  describe();
}

// What is shown.

function playOrHold() {
  if (paused || document.hidden) player?.hold();
  else player?.play();
}

/** Everything that depends on the state of the connection and of the session. */
function describe() {
  const state = trouble ?? (hello === null ? "Connecting"
    : waiting ? `Waiting: place ${waiting} in the queue`
    : !running ? (ended === null ? "Ready" : `Ended: ${ended}`)
    : paused ? "Paused"
    : player.figures.slow ? "Playing, slower than real time"
    : "Playing");
  setText("state", cameBack ? `The server is back. ${state}` : state);
  setText("note", running && !paused ? "" : state === "Ready" ? "Type a prompt and press Enter" : state);
  setText("pause", paused ? "Resume" : "Pause");
  setText("restart", running ? "Restart" : "Start");
  setText("send", running ? "Send" : "Start");
  get("record").setAttribute("aria-pressed", recording);
  for (const id of ["pause", "record"]) get(id).disabled = !running;
  // A video that has come to its end can be kept as well.
  get("save").disabled = hello === null || sessionUrl === null;
  for (const id of ["restart", "send", "load", "start-choose"]) get(id).disabled = hello === null;
  get("num-blocks").disabled = get("transition").value !== "roll";
  document.body.classList.toggle("slow", running && player.figures.slow);
}

function setText(id, text) {
  // A live region that is given its own text again is read out again.
  if (get(id).textContent !== text) get(id).textContent = text;
}

function setAspect({ width, height }) {
  get("stage").style.setProperty("--aspect", width / height);
  get("stage").classList.toggle("pixels", width < 256);
}

/** To those who do not see it. */
function showPrompt(prompt) {
  get("lane-0").ariaLabel = `Video of “${prompt}”`;
  get("lane-1").ariaLabel = `Video with LoRA of “${prompt}”`;
}

function showPresets(presets) {
  get("presets").hidden = presets.length === 0;
  get("preset-list").replaceChildren(
    ...presets.map((preset) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = preset;
      button.addEventListener("click", () => {
        get("prompt").value = preset;
        sendPrompt();
      });
      item.append(button);
      return item;
    }),
  );
}

function offer(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = "";
  link.textContent = `Download the ${name}`;
  get("downloads").replaceChildren(link);
}

function showError(message) {
  get("error-text").textContent = message;
  get("error").hidden = false;
}

// What is typed and pressed.

get("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  get("error").hidden = true;
  sendPrompt();
});
get("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Escape") get("prompt").blur();
  // Enter also ends the composition of a character, in Japanese for example.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (hello) get("prompt-form").requestSubmit();
});
get("pause").addEventListener("click", pause);
get("restart").addEventListener("click", startAnew);
get("record").addEventListener("click", () => {
  connection.send({ type: "record", on: !recording });
});
get("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = downloadAddress(sessionUrl);
  link.download = "";
  link.click();
});
get("load").addEventListener("click", () => get("file").click());
get("file").addEventListener("change", async () => {
  const [file] = get("file").files;
  // The same file may be chosen again.
  get("file").value = "";
  try {
    await replay(file);
  } catch (error) {
    showError(`${file.name}: ${error.message}`);
  }
});
get("new-seed").addEventListener("click", () => {
  get("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
get("compare").addEventListener("change", () => {
  if (running) startAnew();
});
get("transition").addEventListener("change", describe);
get("error-close").addEventListener("click", () => {
  get("error").hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select, button, summary, a")) return;
  if (event.key === " ") pause();
  else if (event.key === "/") get("prompt").focus();
  else return;
  event.preventDefault();
});
document.addEventListener("visibilitychange", playOrHold);
setInterval(() => player?.update(), UPDATE_MS);

const connection = new Connection(receiver);
