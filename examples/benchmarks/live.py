"""Measures `astrolabe live` as its viewers see it, and what sending frames costs.

python examples/benchmarks/live.py --model tiny_shapes --seconds 60
python examples/benchmarks/live.py --recipe longlive --viewers 2
python examples/benchmarks/live.py --url 'ws://127.0.0.1:7860/ws?token=TOKEN'
python examples/benchmarks/live.py --encoding

Viewers are processes of their own. Each shows frames at the model's rate from what has come, as the page does, and
sends another prompt every few seconds. An underrun is a frame that was due and not there. The delay of a prompt is
that from sending it to showing the first frame that was made with it; nothing is decoded.
"""

import argparse
import asyncio
import json
import random
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from websockets.asyncio.client import connect

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import UserError, as_user_error, exit_code
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS


PROMPTS = ("a red circle moves left on a black background", "a blue square moves up on a white background")
# Seconds between two prompts, so that they come at any time within a block.
BETWEEN = (2.0, 4.0)


@dataclass
class Visit:
    """What one viewer saw. Seconds and GB (1e9 bytes)."""

    first_frame: float  # from asking to showing
    frames: int
    underruns: int
    late: list[tuple[int, float]]  # of each of them the frame, and by how many seconds
    seconds: float
    block_seconds: float  # that the server took to make a block, the median
    delays: list[float]  # of prompts
    delay_median: float
    delay_p95: float
    memory_first: float  # as the server says it, with the second block and with the last
    memory_last: float
    megabits_per_second: float


class Viewer:
    """Shows frames as the page does: at a constant rate, what has come, and holds the last one if nothing has."""

    def __init__(self, socket, seed: int, codec: str):
        self.socket, self.codec, self.random = socket, codec, random.Random(seed)
        self.buffer: deque[int] = deque()
        self.arrived = asyncio.Event()
        self.first_frames: dict[int, int] = {}  # by block
        self.sent: deque[float] = deque()  # when prompts were
        self.due: dict[int, float] = {}  # by the block of a mark, when its prompt was sent
        self.delays: list[float] = []
        self.memory: list[float] = []
        self.block_seconds: list[float] = []
        self.late: list[tuple[int, float]] = []
        self.shown = self.received = 0
        self.rate: float | None = None
        self.began: float | None = None  # showing

    async def watch(self, seed: int, seconds: float) -> Visit:
        hello = json.loads(await self.socket.recv())
        self.rate = hello["frame_rate"]
        asked = time.perf_counter()
        await self.send(type="start", prompt=PROMPTS[0], seed=seed, codecs=[self.codec])
        tasks = [asyncio.create_task(run) for run in (self.receive(), self.steer(), self.play(seconds))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        delays = sorted(self.delays)
        return Visit(
            first_frame=self.began - asked,
            frames=self.shown,
            underruns=len(self.late),
            late=self.late,
            seconds=seconds,
            block_seconds=statistics.median(self.block_seconds),
            delays=self.delays,
            delay_median=statistics.median(delays) if delays else float("nan"),
            delay_p95=delays[min(int(0.95 * len(delays)), len(delays) - 1)] if delays else float("nan"),
            memory_first=self.memory[min(1, len(self.memory) - 1)],
            memory_last=self.memory[-1],
            megabits_per_second=8e-6 * self.received * self.rate / max(self.shown, 1),
        )

    async def send(self, **message):
        await self.socket.send(json.dumps(message))

    async def receive(self):
        async for data in self.socket:
            if isinstance(data, bytes):
                _, _, block, frame = struct.unpack_from("<BBxxII", data)
                self.received += len(data)
                self.buffer.append(frame)
                self.first_frames.setdefault(block, frame)
                self.arrived.set()
                continue
            message = json.loads(data)
            if message["type"] == "block":
                self.memory.append(message["memory_gb"])
                self.block_seconds.append(message["seconds"])
            elif message["type"] == "mark" and self.sent:
                self.due[message["block"]] = self.sent.popleft()
            elif message["type"] in ("error", "ended"):
                raise UserError(message.get("message") or message["reason"])
        raise UserError("the server has closed the connection.")

    async def steer(self):
        await self.arrived.wait()
        number = 0
        while True:
            await asyncio.sleep(self.random.uniform(*BETWEEN))
            if self.sent:  # the one before has not taken hold
                continue
            number += 1
            self.sent.append(time.perf_counter())
            await self.send(type="prompt", prompt=PROMPTS[number % 2], transition="roll", num_blocks=1)

    async def play(self, seconds: float):
        await self.arrived.wait()
        self.began = due = time.perf_counter()
        while due < self.began + seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            if not self.buffer:
                self.arrived.clear()
                await asyncio.wait_for(self.arrived.wait(), 60)
                waited, due = time.perf_counter() - due, time.perf_counter()
                self.late.append((self.buffer[0], waited))
            frame = self.buffer.popleft()
            now = time.perf_counter()
            for block in [block for block in self.due if self.first_frames.get(block) == frame]:
                self.delays.append(now - self.due.pop(block))
            self.shown += 1
            await self.send(type="shown", frame=frame)
            # If this process was late itself the clock starts anew, as on the page: frames are not hurried through.
            due = (now if now - due > 1 / self.rate else due) + 1 / self.rate


async def visit(url: str, seed: int, seconds: float, codec: str) -> Visit:
    async with connect(url, max_size=None, proxy=None) as socket:
        return await Viewer(socket, seed, codec).watch(seed, seconds)


@contextmanager
def serving(args: argparse.Namespace):
    """A server of the model in this process; yields its address."""
    import torch
    from random_models import add_tiny_decoder, random_pipeline

    from astrolabe_diffusers.live.app import LiveApp
    from astrolabe_diffusers.live.config import LiveConfig
    from astrolabe_diffusers.live.engine import LiveEngine
    from astrolabe_diffusers.live.load import load_live_app, warm_up
    from astrolabe_diffusers.live.model import LiveModel
    from astrolabe_diffusers.live.server import make_live_server
    from astrolabe_diffusers.serving.binding import bind
    from astrolabe_diffusers.serving.running import in_thread, leave_loaded_alone

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.recipe:
        pipe = random_pipeline(args.recipe, device)
        pipe.set_progress_bar_config(disable=True)
        if args.tiny_decoder:
            add_tiny_decoder(pipe, args.tiny_decoder, pipe.vae.dtype)
        # A model whose videos have an end makes longer ones than by default, until all viewers have seen enough.
        seconds = None if pipe.is_endless else args.seconds + 60
        with as_user_error(f"--seconds {args.seconds:g}, and 60 more"):
            model = LiveModel(pipe, args.recipe, num_frames=seconds and round(seconds * pipe.config.frame_rate))
        if args.compile:
            print(f"compiled in {pipe.compile():.0f} s")
        warm_up(model)
        app = LiveApp(model, LiveEngine(args.viewers))
    else:
        settings = {"compile": args.compile, "tiny_decoder": args.tiny_decoder}
        app = load_live_app(LiveConfig(model=args.model, sessions=args.viewers, **settings))
    leave_loaded_alone()
    with app as live, bind("127.0.0.1", 0) as listener:
        with in_thread(make_live_server(live), listener) as address:
            yield f"ws://{address}/ws"


def measure_encoding(height: int, width: int, number: int = 48) -> dict[str, tuple[float, float, float]]:
    """Milliseconds and kB of a frame, and its PSNR in dB, of each codec, on one core. The frames are smooth noise with
    some grain, which moves: more than most videos have."""
    import io

    import av
    import numpy as np
    from PIL import Image

    from astrolabe_diffusers.live.config import CODECS
    from astrolabe_diffusers.live.encoding import make_encoder

    chance = np.random.default_rng(0)

    def noise(side: int) -> np.ndarray:
        small = chance.integers(0, 255, (height // side + 2, width // side + 2, 3), dtype=np.uint8)
        size = width + 4 * number, height + 2 * number
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)

    picture = (0.8 * noise(24) + 0.15 * noise(6) + 0.05 * noise(2)).astype(np.uint8)
    frames = np.stack([picture[i : i + height, 2 * i : 2 * i + width] for i in range(number)])
    figures = {}
    for codec in CODECS:
        encoder = make_encoder(codec, height, width, 16)
        began = time.perf_counter()
        sent = [data for i in range(0, number, 12) for data in encoder.encode(frames[i : i + 12])]
        milliseconds = 1000 * (time.perf_counter() - began) / number
        if codec == "h264":
            decoder = av.CodecContext.create("h264", "r")
            pictures = [frame for data in sent for frame in decoder.decode(av.Packet(data))] + decoder.decode(None)
            decoded = [
                picture.reformat(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU709").to_ndarray()
                for picture in pictures
            ]
        else:
            decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in sent]
        error = np.mean((np.stack(decoded).astype(np.float32) - frames) ** 2)
        figures[codec] = milliseconds, sum(map(len, sent)) / number / 1000, float(10 * np.log10(255**2 / error))
        print("{}: {:.1f} ms, {:.0f} kB, {:.1f} dB a frame".format(codec, *figures[codec]), flush=True)
    return figures


def main(argv: list[str] | None = None) -> list[Visit] | dict[str, tuple[float, float, float]]:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub id of a pipeline, or tiny_shapes")
    source.add_argument("--recipe", choices=PUBLISHED_MODELS, help="a published model, random weights at full size")
    source.add_argument("--url", help="of the WebSocket of a server that runs")
    source.add_argument("--encoding", action="store_true", help="what the encoding of frames costs")
    parser.add_argument("--viewers", type=int, default=1, help="at a time")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--codec", choices=("h264", "jpeg", "webp"), default="h264")
    parser.add_argument("--compile", action="store_true", help="the transformer's blocks, before they are timed")
    parser.add_argument("--tiny_decoder", help="decode with it: its file or folder; of --recipe, `random` weights too")
    parser.add_argument("--height", type=int, default=480, help="of the frames of --encoding")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.encoding:
        return measure_encoding(args.height, args.width)
    if args.json:
        print(json.dumps(asdict(asyncio.run(visit(args.url, args.seed, args.seconds, args.codec)))))
        return []
    if args.url:
        return report(run_viewers(args.url, args))
    with serving(args) as url:
        return report(run_viewers(url, args))


def run_viewers(url: str, args: argparse.Namespace) -> list[Visit]:
    command = [sys.executable, str(Path(__file__).resolve()), "--json", "--url", url, "--codec", args.codec]
    command += ["--seconds", str(args.seconds)]
    processes = [
        subprocess.Popen([*command, "--seed", str(args.seed + i)], stdout=subprocess.PIPE, text=True)
        for i in range(args.viewers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError("a viewer failed: it has said why.")
    return [Visit(**json.loads(output)) for output in outputs]


def report(visits: list[Visit]) -> list[Visit]:
    for seen in visits:
        values = {name: value for name, value in asdict(seen).items() if name not in ("delays", "late")}
        print("  ".join(f"{name} {value:.3f}".replace(".000", "") for name, value in values.items()), flush=True)
        if seen.late:
            print("late: " + ", ".join(f"frame {frame} by {waited:.2f} s" for frame, waited in seen.late), flush=True)
    return visits


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
