"""The page in a real browser, in front of the real server: what is typed, and what is then on the canvas."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import socket
import struct
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.rewards.metrics.tiny_shapes import TinyShapesPromptMatch
from tests.live.files import video_file
from tests.processes import Script


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright is installed: pip install playwright")

RED = "a red circle moves left on a black background"
BLUE = "a blue square moves up on a white background"
FIRST, LATER = 9, 12  # frames of the first block and of every other

# Keeps what the canvases show since the last start, read back from them after each drawing.
CAPTURE = """(() => {
  window.pictures = [];
  window.WebSocket = class extends WebSocket {
    constructor(address) {
      super(address);
      this.addEventListener("message", ({ data }) => {
        if (typeof data === "string" && JSON.parse(data).type === "started") window.pictures.length = 0;
      });
    }
  };
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (...what) {
    draw.apply(this, what);
    const { id, width, height } = this.canvas;
    const { data } = this.getImageData(0, 0, width, height);
    window.pictures.push({ id, width, height, data, time: performance.now() });
  };
})()"""
WITHOUT_WEBCODECS = "delete window.VideoDecoder"
WEBP_ALONE = """(() => {
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (text) {
    const message = JSON.parse(text);
    if (message.codecs) message.codecs = ["webp"];
    send.call(this, JSON.stringify(message));
  };
})()"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    def __init__(self, *arguments, port: int | None = None, **environment: str):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        arguments = ("--model", "tiny_shapes", "--port", self.port, *arguments)
        self._process = Script("examples/live.py", *arguments, **environment)
        self._process.wait_for(f"at {self.url}")
        self.address = self._process.output().split()[-1]

    def kill(self):
        self._process.kill_all()

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def stop(self):
        self._process.send_signal(signal.SIGINT)
        self._process.finish(timeout=20)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A random LoRA, strong enough to be seen."""
    folder = tmp_path_factory.mktemp("lora") / "strong"
    pipe = DiffusionPipeline.from_pretrained(TINY_SHAPES)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.fixture(scope="module")
def server(lora):
    server = Server("--lora", lora, "--sessions", "2")
    yield server
    server.stop()


@pytest.fixture
def small_server():
    """Has room for one session."""
    server = Server("--sessions", "1")
    yield server
    if server.is_alive:
        server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser):
    """Opens tabs, and closes them; an error on a page fails the test."""
    contexts, errors = [], []

    def open_tab(url, *scripts, answer=None, **options):
        contexts.append(browser.new_context(**options))
        tab = Tab(contexts[-1].new_page(), scripts)
        if answer:
            tab.page.route_web_socket(re.compile("/ws$"), answer)
        tab.page.on("pageerror", lambda error: errors.append(str(error)))
        tab.page.goto(url)
        tab.page.wait_for_selector("#send:enabled")
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    assert errors == []


class Tab:
    def __init__(self, page, scripts=()):
        self.page = page
        self.received, self.sent = [], []  # JSON messages, since the last start
        page.on("websocket", self._listen)
        for script in (CAPTURE, *scripts):
            page.add_init_script(script)

    def _listen(self, websocket):
        def received(data):
            if isinstance(data, str):
                message = json.loads(data)
                if message["type"] == "started":
                    self.received.clear()
                    self.sent.clear()
                self.received.append(message)

        websocket.on("framereceived", received)
        websocket.on("framesent", lambda data: self.sent.append(json.loads(data)) if isinstance(data, str) else None)

    def start(self, prompt: str, seed: int = 0):
        self.page.evaluate("pictures.length = 0")
        self.received.clear()
        self.page.fill("#seed", str(seed))
        self.page.fill("#prompt", prompt)
        if self.page.text_content("#send") == "Start":
            self.page.press("#prompt", "Enter")
        else:
            self.page.click("#restart")

    def send(self, prompt: str):
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def count(self, lane: int = 0) -> int:
        return self.page.evaluate("id => pictures.filter(p => p.id === id).length", f"lane-{lane}")

    def wait_for_frames(self, number: int, lane: int = 0):
        self.page.wait_for_function(
            "([id, number]) => pictures.filter(p => p.id === id).length >= number", arg=[f"lane-{lane}", number]
        )

    def frames(self, start: int, end: int, lane: int = 0) -> np.ndarray:
        """uint8 (F, H, W, 3): what the canvas of a lane has shown, from frame `start` to before `end`."""
        self.wait_for_frames(end, lane)
        read = """([id, start, end]) => pictures.filter(p => p.id === id).slice(start, end).map(
            ({ width, height, data }) => [width, height, btoa(String.fromCharCode(...data))])"""
        pictures = self.page.evaluate(read, [f"lane-{lane}", start, end])
        return np.stack(
            [np.frombuffer(base64.b64decode(d), np.uint8).reshape(h, w, 4)[..., :3] for w, h, d in pictures]
        )

    def of_type(self, name: str) -> list[dict]:
        return [message for message in self.received if message["type"] == name]

    def wait_for_message(self, name: str) -> dict:
        """The first of this type since the last start."""
        deadline = time.monotonic() + 20
        while not self.of_type(name):
            assert time.monotonic() < deadline, f"no {name} came"
            self.page.wait_for_timeout(20)
        return self.of_type(name)[0]

    def wait_for_text(self, selector: str, text: str):
        sync_api.expect(self.page.locator(selector)).to_contain_text(text, timeout=20_000)


def match(frames: np.ndarray, prompt: str) -> float:
    """How well frames (F, H, W, 3) show a prompt, 0 to 1."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return TinyShapesPromptMatch().score(video[None], [prompt]).scores.item()


CODECS = {"h264": "", "jpeg": WITHOUT_WEBCODECS, "webp": WEBP_ALONE}


@pytest.mark.parametrize("codec", CODECS)
def test_type_watch_steer(server, open_tab, codec):
    tab = open_tab(server.url, CODECS[codec])
    tab.start(RED)
    assert tab.wait_for_message("started")["codec"] == codec
    tab.wait_for_frames(FIRST + LATER)
    tab.send(BLUE)
    mark = tab.wait_for_message("mark")
    assert mark["sent_after_block"] < mark["block"] <= mark["sent_after_block"] + 2
    first = FIRST + (mark["block"] - 1) * LATER
    before, after = tab.frames(0, first), tab.frames(first + LATER, first + 3 * LATER)
    assert match(before, RED) > 0.7 > 0.3 > match(before, BLUE)
    assert match(after, BLUE) > 0.7 > 0.3 > match(after, RED)
    # The mark, and the delay as the page has it: later than the block was ready, before it was shown to its end.
    tab.wait_for_text("#log", f"Block {mark['block']}: “{BLUE}”, roll")
    delay = int(re.search(r"seen after (\d+) ms", tab.page.text_content("#log"))[1])
    assert 1000 * mark["seconds"] - 50 <= delay < 3000
    assert tab.page.text_content("#latency") == f"{delay} ms"
    assert tab.page.get_by_role("img", name=f"Video of “{BLUE}”").is_visible()
    assert tab.page.locator("#track .hold").get_attribute("data-label") == f"{delay} ms"


def test_frames_come_at_the_models_rate(server, open_tab):
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(90)
    times = tab.page.evaluate("pictures.slice(10, 90).map(p => p.time)")
    assert np.mean(np.diff(times)) == pytest.approx(1000 / 16, rel=0.03)
    shown = [message["frame"] for message in tab.sent if message["type"] == "shown"]
    assert shown == list(range(len(shown))) and len(shown) >= 90
    assert tab.page.text_content("#lost") == "0"


def test_a_slider_changes_the_picture(server, open_tab):
    """From one seed, base and LoRA side by side: they differ until the LoRA is switched off before a start."""
    tab = open_tab(server.url)
    tab.page.check("#compare")
    tab.start(RED)
    base, with_lora = tab.frames(0, 21), tab.frames(0, 21, lane=1)
    assert np.abs(base.astype(int) - with_lora).mean() > 2
    assert match(base, RED) > 0.7
    tab.page.get_by_role("checkbox", name="strong").uncheck()
    mark = tab.wait_for_message("mark")
    assert mark["event"]["weights"] == {"strong": 0}
    tab.start(RED)
    assert np.array_equal(tab.frames(0, 21), base)
    # And while it runs.
    tab.received.clear()
    tab.page.get_by_role("slider", name="Strength of strong").press("End")
    mark = tab.wait_for_message("mark")
    assert mark["event"]["weights"] == {"strong": 2}
    first = FIRST + (mark["block"] - 1) * LATER
    base, with_lora = (tab.frames(0, first + 2 * LATER, lane) for lane in (0, 1))
    assert np.array_equal(base[:first], with_lora[:first])
    assert np.abs(base[first:].astype(int) - with_lora[first:]).mean() > 1


def test_pause_stops_generation(server, open_tab):
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(20)
    tab.page.press("#prompt", "Escape")
    tab.page.keyboard.press("Space")
    tab.wait_for_text("#state", "Paused")
    tab.page.wait_for_timeout(500)  # the block that was being made
    blocks, frames = len(tab.of_type("block")), tab.count()
    tab.page.wait_for_timeout(1500)
    assert (len(tab.of_type("block")), tab.count()) == (blocks, frames)
    # Others may come after it, of a machine that has other work.
    underruns = tab.page.text_content("#underruns")
    tab.page.keyboard.press("Space")
    tab.wait_for_frames(frames + 1)
    assert tab.page.text_content("#underruns") == underruns
    tab.wait_for_text("#state", "Playing")
    tab.wait_for_frames(frames + 30)
    assert match(tab.frames(0, frames + 30), RED) > 0.7


def test_a_pause_just_before_a_new_video(server, open_tab):
    """Is about the one that was seen: the new one plays, and the page says so."""
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(20)
    tab.received.clear()
    tab.page.evaluate("for (const id of ['restart', 'pause']) document.getElementById(id).click()")
    tab.wait_for_message("started")
    tab.wait_for_frames(FIRST + 3 * LATER)
    assert tab.page.text_content("#state").startswith("Playing")


def test_a_hidden_tab_waits(server, open_tab):
    tab = open_tab(server.url)
    hide = """hidden => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    tab.start(RED)
    tab.wait_for_frames(20)
    tab.page.evaluate(hide, True)
    tab.page.wait_for_timeout(500)
    blocks = len(tab.of_type("block"))
    tab.page.wait_for_timeout(1500)
    assert len(tab.of_type("block")) == blocks
    count, underruns = tab.count(), tab.page.text_content("#underruns")
    tab.page.evaluate(hide, False)
    tab.wait_for_frames(count + 1)
    assert tab.page.text_content("#underruns") == underruns
    tab.wait_for_frames(count + 30)
    assert tab.page.text_content("#lost") == "0"


KEEP_DECODERS = """(() => {
  window.decoders = [];
  window.VideoDecoder = class extends VideoDecoder {
    constructor(init) {
      super(init);
      window.decoders.push(this);
    }
  };
})()"""


def test_a_decoder_that_the_browser_has_closed_is_opened_again(server, open_tab):
    """As Chromium does it to a tab that is hidden for a minute and a half."""
    tab = open_tab(server.url, KEEP_DECODERS)
    tab.start(RED)
    assert tab.wait_for_message("started")["codec"] == "h264"
    tab.wait_for_frames(20)
    tab.page.click("#pause")
    tab.page.wait_for_timeout(1000)  # what has come is decoded
    tab.page.evaluate("decoders.forEach((decoder) => decoder.close())")
    tab.page.click("#pause")
    tab.wait_for_frames(70)
    assert match(tab.frames(40, 70), RED) > 0.7
    assert tab.page.text_content("#lost") == "0"
    # Within a block, what it had is lost, and counted.
    tab.page.evaluate("""() => {
      const decode = VideoDecoder.prototype.decode;
      VideoDecoder.prototype.decode = function (chunk) {
        const { type, timestamp } = chunk;
        if (type === "delta") return decode.call(this, chunk);
        VideoDecoder.prototype.decode = decode;
        decode.call(this, new EncodedVideoChunk({ type, timestamp, data: new Uint8Array(99) }));
      };
    }""")
    tab.wait_for_text("#lost", "12")
    count = tab.count()
    tab.wait_for_frames(count + 30)
    assert match(tab.frames(count, count + 30), RED) > 0.7
    assert tab.page.locator("#error").is_visible()


def test_record_and_replay(server, open_tab, tmp_path):
    """The same frames as at first, and in the recording all of them in their order."""
    tab = open_tab(server.url)
    tab.start(RED, seed=3)
    tab.page.get_by_role("button", name="Record").click()
    tab.wait_for_frames(FIRST + LATER)
    tab.page.select_option("#transition", "cut")
    tab.send(BLUE)
    mark = tab.wait_for_message("mark")
    length = FIRST + (mark["block"] + 2) * LATER
    frames = tab.frames(0, length)
    tab.page.get_by_role("button", name="Record").click()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Download").click()
    video = iio.imread(download.value.path(), plugin="FFMPEG", extension=".mp4")
    assert len(video) == tab.of_type("recording")[-1]["frames"]
    # It begins with a block. Each of its frames is nearest to one of the canvas, and these follow each other; but for
    # the first of a scene, which is held for four.
    errors = [np.abs(frames - frame.astype(float)).mean((1, 2, 3)) for frame in video[: length - 2 * LATER]]
    nearest = np.argmin(errors, 1)
    assert nearest[0] in (0, FIRST)
    assert np.mean(nearest == nearest[0] + np.arange(len(nearest))) > 0.9

    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save session").click()
    saved = json.loads(download.value.path().read_text())
    assert saved["seed"] == 3 and saved["prompt"] == RED
    prompts = [(event["block"], event["prompt"]) for event in saved["events"] if event["type"] == "prompt"]
    assert prompts == [(mark["block"], BLUE)]

    tab.page.evaluate("pictures.length = 0")
    tab.received.clear()
    tab.page.set_input_files("#file", download.value.path())
    assert np.array_equal(tab.frames(0, length), frames)
    tab.wait_for_text("#log", f"Block {mark['block']}: “{BLUE}”, cut")


def test_a_replay_without_a_lora_that_is_loaded(lora, open_tab, tmp_path):
    """The page has it off, and moving another one leaves it there."""
    other = tmp_path / "other"
    shutil.copytree(lora, other)
    server = Server("--lora", lora, other)
    tab = open_tab(server.url)
    tab.page.get_by_role("slider", name="Strength of strong").press("End")
    tab.start(RED)
    tab.wait_for_frames(FIRST)
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save session").click()
    saved = json.loads(download.value.path().read_text())
    del saved["loras"]["other"]
    saved["events"] = [{"block": 0, "type": "lora", "weights": {"strong": 0.5}}]
    (tmp_path / "session.json").write_text(json.dumps(saved))
    tab.received.clear()
    tab.page.set_input_files("#file", tmp_path / "session.json")
    assert tab.wait_for_message("started")["loras"]["other"] == 0
    tab.wait_for_message("mark")
    state = lambda: [tab.page.get_by_role("checkbox", name=name).is_checked() for name in ("strong", "other")]  # noqa: E731
    assert state() == [True, False]
    assert tab.page.locator("#lora-list output").all_text_contents()[0] == "0.50"
    tab.received.clear()
    tab.page.get_by_role("slider", name="Strength of strong").press("End")
    assert tab.wait_for_message("mark")["event"]["weights"] == {"strong": 2}
    assert state() == [True, False]
    # From then on a restart begins with what the page shows.
    tab.start(RED)
    assert tab.wait_for_message("started")
    assert tab.wait_for_message("mark")["event"]["weights"] == {"strong": 2, "other": 0}
    server.stop()


def test_a_recording_without_a_frame(server, open_tab):
    """Pause, Record, Restart: the button is as it was, and works."""
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(FIRST + LATER)
    tab.page.click("#pause")
    tab.page.click("#record")
    record = sync_api.expect(tab.page.locator("#record"))
    record.to_have_attribute("aria-pressed", "true")
    tab.page.click("#restart")
    record.to_have_attribute("aria-pressed", "false")
    tab.page.click("#record")
    record.to_have_attribute("aria-pressed", "true")
    tab.wait_for_frames(FIRST + 2 * LATER)
    tab.page.click("#record")
    tab.page.get_by_role("link", name="Download").wait_for()
    record.to_have_attribute("aria-pressed", "false")


def drop(tab, event: str, name: str, data: bytes):
    """A file is dropped on the page, or pasted."""
    tab.page.evaluate(
        """([event, name, data]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
          const given = event === "drop" ? { dataTransfer: transfer } : { clipboardData: transfer };
          const Kind = event === "drop" ? DragEvent : ClipboardEvent;
          document.body.dispatchEvent(new Kind(event, { ...given, bubbles: true, cancelable: true }));
        }""",
        [event, name, base64.b64encode(data).decode()],
    )


@pytest.fixture(scope="module")
def blue_video(tmp_path_factory):
    """25 frames, in a file of more parts than one."""
    path = tmp_path_factory.mktemp("video") / "blue.mp4"
    pipe = DiffusionPipeline.from_pretrained(TINY_SHAPES)
    frames = pipe(BLUE, num_frames=33, generator=torch.Generator().manual_seed(0), output_type="uint8").frames[0]
    iio.imwrite(path, frames[:25].numpy(), fps=16)
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 2**17, b"free") + bytes(2**17 - 8))
    return path


def test_a_file_to_start_from(server, open_tab, tmp_path, blue_video):
    """Chosen by keyboard, shown, used in both lanes by the next start, saved, replayed, removed; dropped, pasted."""
    markup = "<img src=x onerror=alert(1)>.mp4"
    path = tmp_path / markup
    path.write_bytes(blue_video.read_bytes())
    wanted = iio.imread(path, plugin="FFMPEG")[:21].astype(int)
    tab = open_tab(server.url, viewport={"width": 360, "height": 740})
    # From now on: Chromium can open a dialog of its own before it has heard that somebody waits for it.
    tab.page.on("filechooser", lambda chooser: None)
    tab.start(RED, seed=5)
    tab.wait_for_frames(FIRST)
    tab.page.focus("#start-choose")
    with tab.page.expect_file_chooser() as chooser:
        tab.page.keyboard.press("Enter")
    chooser.value.set_files(path)
    tab.wait_for_text("#start-state", f"{markup}: its first 21 frames")
    assert tab.page.locator("#start-frames img").count() == 1
    picture = tab.page.get_by_role("img", name=f"The first frame of {markup}")
    assert picture.evaluate("e => e.decode().then(() => [e.naturalWidth, e.naturalHeight])") == [96, 96]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.page.evaluate("document.activeElement.id") == "start-choose"
    # The video that runs goes on; the next one begins with it.
    assert match(tab.frames(0, 33), RED) > 0.7
    tab.received.clear()
    tab.page.check("#compare")
    assert tab.wait_for_message("started")["compare"]
    lanes = [tab.frames(0, 45, lane) for lane in (0, 1)]
    for frames in lanes:
        assert abs(frames[:21] - wanted).mean() < 10
        assert match(frames[:21], BLUE) > 0.7
    assert not np.array_equal(lanes[0][21:], lanes[1][21:])

    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save session").click()
    saved = download.value.path()
    uri = json.loads(saved.read_text())["start_frames"]
    assert base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) == path.read_bytes()
    tab.page.get_by_role("button", name="Remove the file to start from").click()
    tab.page.wait_for_selector("#start-picture", state="hidden")
    tab.page.evaluate("pictures.length = 0")
    tab.received.clear()
    tab.page.set_input_files("#file", saved)
    assert all(np.array_equal(tab.frames(0, 45, lane), frames) for lane, frames in enumerate(lanes))
    tab.wait_for_text("#start-state", f"{saved.name}: its first 21 frames")

    # What is wrong is said, and the one before stays.
    drop(tab, "drop", "<b>notes</b>.txt", b"hello")
    tab.wait_for_text("[role=alert]", "<b>notes</b>.txt: a file to start from is one of")
    drop(tab, "paste", "large.mp4", bytes(2**23 + 1))
    tab.wait_for_text("[role=alert]", "large.mp4: it has 8388609 bytes; there may be 8388608.")
    tab.wait_for_text("#start-state", f"{saved.name}: its first 21 frames")
    drop(tab, "paste", "nine.mp4", video_file(tmp_path / "nine.mp4", 9).read_bytes())
    tab.wait_for_text("#start-state", "nine.mp4: its first 9 frames")
    tab.page.fill("#strength", "0.5")
    tab.page.click("#restart")
    tab.wait_for_text("#state", "Ended: the video has come to its end")
    tab.wait_for_frames(9)
    tab.page.wait_for_timeout(500)
    assert tab.count() == 9 and tab.page.locator("[role=alert] b").count() == 0


def test_a_server_that_comes_back_gets_the_file_again(open_tab, tmp_path):
    path = video_file(tmp_path / "video.mp4", 9, 96, 96)
    server = Server()
    tab = open_tab(server.url)
    tab.page.set_input_files("#start-file", path)
    tab.wait_for_text("#start-state", "video.mp4: its first 9 frames")
    tab.start(RED)
    frames = tab.frames(0, 9)
    server.kill()
    tab.wait_for_text("#state", "No connection")
    again = Server(port=server.port)
    tab.wait_for_text("#state", "The server is back. Playing")
    assert np.array_equal(tab.frames(0, 9), frames)
    again.stop()


def test_files_that_are_no_session_of_this_model(server, open_tab, tmp_path):
    tab = open_tab(server.url)
    session = {"version": 1, "prompt": RED, "seed": 0, "height": 96, "width": 96, "num_blocks": 1, "events": []}
    session |= {"model": "tiny_shapes", "weights": "of another", "loras": {}}
    for text, error in (
        ("red", "notes.json: the file is no JSON"),
        ("[]", "notes.json: it is no session, which has"),
        (json.dumps(session), "notes.json: it was made with other weights than those of tiny_shapes"),
        (" " * (2**24 + 1), "notes.json: it has 16777217 bytes; there may be 16777216."),
    ):
        (tmp_path / "notes.json").write_text(text)
        tab.page.set_input_files("#file", tmp_path / "notes.json")
        tab.wait_for_text("[role=alert]", error)
    assert tab.page.text_content("#state") == "Ready"


def test_two_tabs(server, open_tab):
    tabs = {prompt: open_tab(server.url) for prompt in (RED, BLUE)}
    for prompt, tab in tabs.items():
        tab.start(prompt)
    for prompt, tab in tabs.items():
        assert match(tab.frames(0, 45), prompt) > 0.7


def test_reload_in_the_middle(small_server, open_tab):
    """The session of before gives its place back."""
    tab = open_tab(small_server.url)
    tab.start(RED)
    tab.wait_for_frames(20)
    tab.page.reload()
    tab.page.wait_for_selector("#send:enabled")
    tab.start(BLUE)
    assert match(tab.frames(0, 33), BLUE) > 0.7


def test_a_lora_that_is_moved_while_it_waits(lora, open_tab):
    """Holds from the first block on, or from the next."""
    server = Server("--lora", lora, "--sessions", "1")
    first, second = (open_tab(server.url) for _ in range(2))
    first.start(RED)
    first.wait_for_frames(FIRST)
    second.start(RED)
    second.wait_for_text("#state", "place 1 in the queue")
    second.page.get_by_role("checkbox", name="strong").uncheck()
    first.page.close()
    mark = second.wait_for_message("mark")
    assert mark["event"]["weights"] == {"strong": 0} and mark["block"] <= 1
    assert [message["weights"] for message in second.sent if message["type"] == "lora"] == [{"strong": 0}]
    server.stop()


def test_a_start_that_is_refused_is_not_what_comes_back(small_server, open_tab):
    """The one that waits, and the prompt that it has, are."""
    port = small_server.port
    first, second = (open_tab(small_server.url) for _ in range(2))
    first.start(RED)
    first.wait_for_frames(FIRST)
    second.start(BLUE)
    second.wait_for_text("#state", "place 1 in the queue")
    second.page.fill("#height", "7")
    second.page.fill("#prompt", RED)
    second.page.press("#prompt", "Enter")
    second.wait_for_text("[role=alert]", "multiple of")
    first.page.close()
    second.wait_for_text("#state", "Playing")
    assert second.page.get_by_role("img", name=f"Video of “{BLUE}”").is_visible()
    small_server.kill()
    second.wait_for_text("#state", "No connection")
    second.page.evaluate("pictures.length = 0")
    again = Server(port=port)
    second.wait_for_text("#state", "The server is back. Playing")
    assert match(second.frames(0, 33), BLUE) > 0.7
    again.stop()


def test_three_on_one_slot(small_server, open_tab):
    first, second, third = (open_tab(small_server.url) for _ in range(3))
    for tab, state in ((first, "Playing"), (second, "place 1 in the queue"), (third, "place 2 in the queue")):
        tab.start(RED)
        tab.wait_for_text("#state", state)
    first.page.close()
    second.wait_for_text("#state", "Playing")
    third.wait_for_text("#state", "place 1 in the queue")
    assert match(second.frames(0, 33), RED) > 0.7
    assert third.count() == 0


def test_the_server_goes_and_comes_back(open_tab):
    server = Server()
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(20)
    tab.send(BLUE)
    tab.wait_for_message("mark")
    server.kill()
    tab.wait_for_text("#state", "No connection")
    assert tab.page.is_disabled("#send")
    tab.page.evaluate("pictures.length = 0")
    again = Server(port=server.port)
    tab.wait_for_text("#state", "The server is back. Playing")
    # With the prompt that was on.
    assert match(tab.frames(0, 33), BLUE) > 0.7
    again.stop()


def test_a_token(browser, open_tab):
    """It goes from the address that the command prints to the connection and to downloads."""
    server = Server(ASTROLABE_LIVE_TOKEN="open+sesame&1")
    stranger = browser.new_page()
    stranger.goto(server.url)
    words = "The server closed the connection: this server wants its token"
    sync_api.expect(stranger.locator("#state")).to_contain_text(words)
    assert stranger.is_disabled("#send")
    stranger.close()
    open_tab(server.address.replace("?", "#"))
    tab = open_tab(server.address)
    tab.start(RED)
    tab.page.get_by_role("button", name="Record").click()
    tab.wait_for_frames(FIRST + LATER)
    tab.page.get_by_role("button", name="Record").click()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Download").click()
    assert download.value.path().stat().st_size > 1000
    server.stop()


def test_markup_is_text(server, open_tab):
    tab = open_tab(server.url)
    markup = '<img src=x onerror="document.title = 1"> a red circle'
    tab.start(markup)
    tab.wait_for_frames(12)
    tab.send(f"{markup} moves")
    tab.wait_for_text("#log", f"{markup} moves")
    # What the server says of a prompt that it refuses has the prompt in it.
    tab.send("<b>a | [9x]</b>")
    tab.wait_for_text("[role=alert]", "<b>a")
    assert tab.page.locator("main img:not(#start-picture), main b, [role=alert] b").count() == 0
    assert tab.page.title() == "Astrolabe live"


def test_scenes(server, open_tab):
    tab = open_tab(server.url)
    tab.start(f"{RED} [2.1s#] | {BLUE}")
    # 33 frames are two seconds, of 9 and twice 12.
    frames = tab.frames(0, 33 + 3 * LATER)
    assert match(frames[:30], RED) > 0.7 and match(frames[-2 * LATER :], BLUE) > 0.7


# With a server of which every message is the test's.


HELLO = {
    "type": "hello",
    "model": "a model",
    "frame_rate": 16,
    "height": 16,
    "width": 32,
    "frames_first_block": 4,
    "frames_per_block": 4,
    "transitions": ["roll", "recache", "flush", "rope_cut", "cut"],
    "presets": ["one"],
    "loras": {},
    "max_pixels": 4096,
    "version": 1,
    "start_media": [],
    "max_upload": 0,
    "max_session": 0,
    "max_transition_blocks": 32,
}
STARTED = {"type": "started", "start": 1, "seed": 0, "height": 16, "width": 32, "codec": "jpeg"}


def send_pictures(end, block: int, first_frame: int, colors: list[tuple[int, int, int] | None]):
    """A block's JPEG pictures of 32x16 pixels, each of one colour, as the server sends them; one of None is none."""
    for frame, color in enumerate(colors, first_frame):
        file = io.BytesIO(b"no picture")
        if color:
            Image.new("RGB", (32, 16), color).save(file, "JPEG", quality=95)
        end.send(struct.pack("<BBxxII", 1, 0, block, frame) + file.getvalue())


@pytest.fixture
def server_of_messages(server, open_tab):
    """A tab that has pressed start, the test's end of its connection, and what the page has sent."""
    ends, sent = [], []

    def answer(end):
        ends.append(end)
        end.on_message(lambda text: sent.append(json.loads(text)))
        end.send(json.dumps(HELLO | {"loras": {"one": 1.0}}))

    tab = open_tab(server.url, answer=answer)
    tab.start("one")
    ends[0].send(json.dumps({"type": "queue", "position": 0, "sessions": 1, "start": 1}))
    ends[0].send(json.dumps(STARTED))
    yield tab, ends, sent


def block(number: int, first_frame: int, **values) -> dict:
    figures = {"seconds": 1.0, "turn_seconds": 1.0, "memory_gb": 0.5, "lane": 0, **values}
    return {"type": "block", "block": number, "first_frame": first_frame, "frames": 4, **figures}


GREYS = [(shade, shade, shade) for shade in range(0, 240, 20)]


def test_an_empty_buffer_holds_the_picture_and_is_counted(server_of_messages):
    """Also when the server leaves out what a slow reader has not read: neither is hidden."""
    tab, (end,), sent = server_of_messages
    for number, first in ((0, 0), (2, 8)):  # block 1 is never sent
        end.send(json.dumps(block(number, first)))
        send_pictures(end, number, first, GREYS[first : first + 4])
        tab.page.wait_for_timeout(1000)
    shades = tab.frames(0, 8).mean((1, 2, 3))
    assert np.allclose(shades, [grey[0] for grey in GREYS[:4] + GREYS[8:]], atol=2)
    assert tab.count() == 8
    assert [message["frame"] for message in sent if message["type"] == "shown"] == [0, 1, 2, 3, 8, 9, 10, 11]
    figures = {name: tab.page.text_content(f"#{name}") for name in ("underruns", "lost", "made", "memory")}
    assert figures == {"underruns": "2", "lost": "4", "made": "4.0 frames/s", "memory": "0.50 GB"}
    tab.wait_for_text("#log", "The buffer ran dry before frame 4.")
    tab.wait_for_text("#state", "Playing, slower than real time")


def test_a_server_with_other_viewers_may_be_slow(server_of_messages):
    """Though the model alone is not."""
    tab, (end,), _ = server_of_messages
    end.send(json.dumps(block(0, 0, seconds=0.1, turn_seconds=0.1)))
    send_pictures(end, 0, 0, GREYS[:4])
    tab.wait_for_frames(4)
    tab.wait_for_text("#made", "40.0 frames/s")
    assert tab.page.text_content("#state") == "Playing"
    end.send(json.dumps(block(1, 4, seconds=0.1, turn_seconds=0.9)))
    tab.wait_for_text("#state", "Playing, slower than real time")
    assert tab.page.text_content("#made") == "40.0 frames/s"


def test_pictures_that_cannot_be_decoded_are_lost_alone(server_of_messages):
    """And the server is told when there are no others, or it would wait for ever."""
    tab, (end,), sent = server_of_messages
    end.send(json.dumps(block(0, 0)))
    send_pictures(end, 0, 0, [GREYS[0], None, *GREYS[2:4]])
    tab.wait_for_frames(3)
    for number in (1, 2):
        end.send(json.dumps(block(number, 4 * number)))
        send_pictures(end, number, 4 * number, 4 * [None])
    tab.wait_for_text("#lost", "9")
    assert max(message["frame"] for message in sent if message["type"] == "shown") == 11
    end.send(json.dumps(block(3, 12)))
    send_pictures(end, 3, 12, GREYS[8:12])
    shades = tab.frames(0, 7).mean((1, 2, 3))
    assert np.allclose(shades, [GREYS[i][0] for i in (0, 2, 3, 8, 9, 10, 11)], atol=2)
    assert tab.page.text_content("#lost") == "9" and tab.page.locator("#error").is_visible()


def test_weights_that_a_slider_does_not_have(server, open_tab):
    """Stay what the server loaded, until somebody moves the slider."""
    ends, sent = [], []
    loras = {"between": 0.73, "below": -0.5, "above": 7.5, "off": 0.0}

    def answer(end):
        ends.append(end)
        end.on_message(lambda text: sent.append(json.loads(text)))
        end.send(json.dumps({**HELLO, "loras": loras}))

    def started():
        tab.start("one")
        tab.page.wait_for_timeout(500)
        return [message["events"] for message in sent if message["type"] == "start"][-1]

    tab = open_tab(server.url, answer=answer)
    assert started() == []
    texts = tab.page.locator("#lora-list output").all_text_contents()
    assert texts == ["0.73", "-0.50", "7.50", "0.00"]
    (end,) = ends
    end.send(json.dumps({"type": "queue", "position": 0, "sessions": 1, "start": 1}))
    end.send(json.dumps(STARTED))
    # Another's, in a session that is replayed.
    event = {"type": "lora", "weights": {"below": -3.21, "off": 2.345}}
    send_mark(end, event | {"id": None}, 0)
    tab.page.wait_for_function("() => document.querySelector('#lora-off').value > 2")
    tab.page.get_by_label("Strength of between").press("ArrowRight")
    moved = [message for message in sent if message["type"] == "lora"]
    now = {"between": 0.8, "below": -3.21, "off": 2.345}
    assert [message["weights"] for message in moved] == [{"between": 0.8}]
    assert started() == [{"block": 0, "type": "lora", "weights": now}]


def send_block(end, number: int, colors):
    end.send(json.dumps(block(number, 4 * number)))
    send_pictures(end, number, 4 * number, colors)


def send_mark(end, event: dict, number: int):
    event = dict(event)
    mark = {"id": event.pop("id"), "event": event, "sent_after_block": number - 2, "block": number, "seconds": 0.01}
    end.send(json.dumps({"type": "mark", **mark}))


def test_a_mark_is_of_what_took_hold(server_of_messages):
    """Not of what was sent while its block was made: both have their delays, and a slider stays where it was put."""
    tab, (end,), sent = server_of_messages
    send_block(end, 0, GREYS[:4])
    tab.wait_for_frames(4)
    slider = tab.page.get_by_role("slider", name="Strength of one")
    for _ in range(2):
        tab.send("two")
        slider.press("ArrowRight")
        tab.page.wait_for_timeout(100)
    events = [message for message in sent if message["type"] in ("prompt", "lora")]
    assert [event["type"] for event in events] == ["prompt", "lora"] * 2
    assert [event.get("weights") for event in events[1::2]] == [{"one": 1.05}, {"one": 1.1}]
    for number in (1, 2):
        for event in events[2 * number - 2 : 2 * number]:
            send_mark(end, event, number)
        send_block(end, number, GREYS[4:8])
        tab.wait_for_frames(4 * (number + 1))
        assert slider.input_value() == "1.1"
    lines = tab.page.locator("#log li").filter(has_text="Block").all_text_contents()
    assert len(lines) == 4 and all("seen after" in line for line in lines)
    # One of a session that is replayed has none.
    send_mark(end, {"type": "lora", "weights": {"one": 0.25}, "id": None}, 3)
    send_block(end, 3, GREYS[8:12])
    tab.wait_for_text("#log", "Block 3: LoRA one at 0.25.")
    assert slider.input_value() == "0.25"


@pytest.mark.parametrize("lost", ["left out", "first frame", "all"])
def test_a_mark_whose_block_is_lost_holds_with_what_is_seen(server_of_messages, lost):
    tab, (end,), sent = server_of_messages
    send_block(end, 0, GREYS[:4])
    tab.wait_for_frames(4)
    tab.send("two")
    tab.page.wait_for_timeout(100)
    send_mark(end, sent[-1], 1)
    if lost != "left out":
        send_block(end, 1, [None, *([None] * 3 if lost == "all" else GREYS[5:8])])
    else:
        send_block(end, 2, GREYS[8:12])
    if lost == "all":
        tab.wait_for_text("#lost", "4")
        send_block(end, 2, GREYS[8:12])
    tab.wait_for_text("#log", "Block 1: “two”, roll; sent before block 0")
    tab.wait_for_text("#latency", " ms")


def test_a_refused_connection_is_not_tried_again(server_of_messages):
    tab, ends, _ = server_of_messages
    ends[0].close(code=1008, reason="the token is wrong")
    tab.wait_for_text("#state", "The server closed the connection: the token is wrong")
    tab.page.wait_for_timeout(1500)
    assert len(ends) == 1


# Who looks at it and how.


@pytest.mark.parametrize("width", [360, 390, 800, 1280, 2560, 3840])
def test_fits_every_screen(server, open_tab, width):
    """Nothing is cut off, and the picture and the prompt are seen without scrolling."""
    height = {360: 740, 390: 844}.get(width, width * 9 // 16)
    tab = open_tab(server.url, viewport={"width": width, "height": height})
    tab.page.check("#compare")
    tab.start(RED)
    tab.wait_for_frames(9)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#lane-0", "#lane-1", "#prompt", "#pause"):
        box = tab.page.locator(name).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    assert tab.page.locator("#lane-0").bounding_box()["width"] >= min(0.25 * width, 400)


def test_every_control_has_a_name_and_is_reached_by_tab(server, open_tab):
    tab = open_tab(server.url)
    tab.start(RED)
    tab.wait_for_frames(9)
    name = "e => e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()"
    controls = tab.page.locator("button, input, select, textarea, summary, a").filter(visible=True)
    visible = controls.evaluate_all(f"all => all.filter(e => !e.disabled).map({name})")
    assert len(visible) > 15 and all(visible)
    tab.page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(len(visible) + 5):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate(f"({name})(document.activeElement)"))
    assert set(visible) <= reached
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("/")
    assert tab.page.evaluate("document.activeElement.id") == "prompt"


def test_nothing_comes_from_elsewhere(server, browser):
    """No CDN: every address that the page asks for is the server's."""
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#send:enabled")
    page.close()
    assert len(asked) > 5
    assert all(url.startswith((server.url, "data:,")) for url in asked)
