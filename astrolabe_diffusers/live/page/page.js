// A page to try the server with: JPEG frames, played at the model's rate.
const socket = new WebSocket(`${location.origin.replace("http", "ws")}/ws${location.search}`);
socket.binaryType = "arraybuffer";
const canvas = document.getElementById("canvas");
const status = document.getElementById("status");
const prompt = document.getElementById("prompt");
const queue = [];
let hello = null;

function send(message) {
  socket.send(JSON.stringify(message));
}

socket.onmessage = async ({ data }) => {
  if (typeof data === "string") {
    const message = JSON.parse(data);
    if (message.type !== "block") status.textContent = `${JSON.stringify(message)}\n${status.textContent}`.slice(0, 2000);
    if (message.type === "hello") {
      hello = message;
      prompt.value = hello.presets[0] ?? "";
      send({ type: "start", prompt: prompt.value, seed: 0, codecs: ["jpeg"] });
      setInterval(show, 1000 / hello.frame_rate);
    }
    return;
  }
  const view = new DataView(data);
  const number = view.getUint16(2, true);
  const first = view.getUint32(8, true);
  let at = 16 + 4 * number;
  for (let i = 0; i < number; i++) {
    const length = view.getUint32(16 + 4 * i, true);
    queue.push([first + i, createImageBitmap(new Blob([data.slice(at, at + length)], { type: "image/jpeg" }))]);
    at += length;
  }
};

async function show() {
  if (!queue.length) return;
  const [frame, picture] = queue.shift();
  canvas.getContext("2d").drawImage(await picture, 0, 0);
  send({ type: "shown", frame });
}

document.getElementById("form").onsubmit = (event) => {
  event.preventDefault();
  send({ type: "prompt", prompt: prompt.value, transition: "roll", num_blocks: 1 });
};
