"""What `generation.py --baseline` prints: the published way, ours and ours compiled, on one card in one process."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from kernel_time import KernelTime, kernel_times
from measuring import Measurement, clock, forget_peak, gpu_peak, measure, timed
from operations import Work, attention_kernels, decoding, denoising, peak_rate
from published_way import PublishedWay

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.models.latent_frames import num_latents_of
from astrolabe_diffusers.models.vae_streaming import StreamingVAEDecoder
from astrolabe_diffusers.reporting.machine import device_name, peak_memory_gb
from astrolabe_diffusers.reporting.markdown import markdown_table


OURS, COMPILED = "ours", "ours, compiled"


@dataclass(frozen=True)
class Clip:
    """What is generated: `batch_size` videos of `num_frames`, `height` by `width` pixels."""

    batch_size: int
    num_frames: int
    height: int
    width: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}


@dataclass
class Column:
    """One way of generating, whose parts can be run by themselves."""

    name: str
    pipe: CausalWanPipeline
    yardstick: PublishedWay | None = None  # the published way, or ours

    @property
    def streams(self) -> bool:
        """Whether a block is decoded before the next one is made, which begins with frames of it (Krea)."""
        return self.pipe.config.num_context_frames is not None

    def denoise(self, clip: Clip, prompt_embeds: torch.Tensor) -> Iterator[torch.Tensor]:
        """The latents of each block."""
        prompt_embeds = prompt_embeds.expand(clip.batch_size, -1, -1)
        if self.yardstick:
            return self.yardstick.blocks(prompt_embeds, **clip.sizes)
        return self.pipe.stream(prompt_embeds=prompt_embeds, **clip.sizes, output_type="latent")

    def decode(self, latents: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The frames of each block."""
        decoder = self.yardstick.decoder if self.yardstick else StreamingVAEDecoder(self.pipe.vae)
        decoder.reset()
        for block in latents:
            with torch.no_grad():
                yield decoder.decode(block)
        decoder.reset()  # which frees what it remembers

    def measure(self, clip: Clip, prompt: str, repetitions: int) -> Measurement:
        if self.yardstick:
            return measure_published(self, clip, prompt, repetitions)
        return measure(self.pipe, repetitions, prompt=prompt, num_videos_per_prompt=clip.batch_size, **clip.sizes)

    def generate(self, clip: Clip, prompt_embeds: torch.Tensor) -> Iterator[torch.Tensor]:
        """From noise to frames, in pieces of any kind."""
        if self.yardstick is None:
            prompt_embeds = prompt_embeds.expand(clip.batch_size, -1, -1)
            yield from self.pipe.stream(prompt_embeds=prompt_embeds, **clip.sizes, output_type="pt")
            return
        latents = []
        for block in self.denoise(clip, prompt_embeds):
            latents.append(block)
            yield block
        if not self.streams:
            yield self.yardstick.whole(latents)


def measure_published(column: Column, clip: Clip, prompt: str, repetitions: int) -> Measurement:
    """As [`measure`]. The first frames are there when all are, but for Krea's; those a second are of a block's passes
    and its decoding."""
    pipe, yardstick = column.pipe, column.yardstick

    def run(latents: list[torch.Tensor]) -> list[float]:
        """Seconds of the text, of every block, and of decoding."""
        start = clock()
        prompt_embeds = pipe.encode_prompt([prompt] * clip.batch_size)
        pipe.maybe_free_model_hooks()
        times = [clock() - start, *timed(map(latents.append, column.denoise(clip, prompt_embeds)))]
        start = clock()
        yardstick.whole(latents)
        return [*times, clock() - start]

    run(latents := [])  # chooses kernels
    forget_peak()
    runs = [run([]) for _ in range(repetitions)]
    gpu_memory = gpu_peak()
    block = median(times[-2] for times in runs)
    decode_block = median(timed(column.decode(latents[:3]))[-1] for _ in range(repetitions))
    num_frames = clip.batch_size * latents[-1].shape[2] * pipe.vae.config.scale_factor_temporal
    return Measurement(
        first_frames=median(sum(times[:2] if column.streams else times) for times in runs),
        first_block=median(times[1] for times in runs),
        block=block,
        denoise=median(sum(times[1:-1]) for times in runs),
        decode_block=decode_block,
        decode=median(times[-1] for times in runs),
        frames_per_second=num_frames / (block if column.streams else block + decode_block),
        gpu_memory=gpu_memory,
        host_memory=peak_memory_gb(torch.device("cpu")),
    )


@dataclass
class Row:
    label: str
    values: list[float | None]  # of each column
    floor: float | None = None
    digits: int = 3
    more_is_faster: bool = False
    compared: bool = True

    def cells(self, pairs: Sequence[tuple[int, int]]) -> list[str]:
        """Label, columns, how many times faster the second column of each pair is than the first, floor."""

        def cell(value: float | None, digits: int = self.digits) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        def faster(slow: int, fast: int) -> float | None:
            slow, fast = self.values[slow], self.values[fast]
            if not slow or not fast:
                return None
            return fast / slow if self.more_is_faster else slow / fast

        ratios = " / ".join(cell(faster(*pair), 2) for pair in pairs) if self.compared else "-"
        return [self.label, *map(cell, self.values), ratios, cell(self.floor)]


def rows_of(
    clip: Clip,
    results: list[Measurement],
    blocks: list[Work],
    latents: list[Work],
    device: torch.device,
    dtype: torch.dtype,
    peak: float,
) -> list[Row]:
    """The table's, of the columns' `results`. `blocks` and `latents` are what has to be computed for each of the clip,
    `peak` is in operations a second."""

    def values(name: str) -> list[float]:
        return [getattr(result, name) for result in results]

    def floor(works: list[Work]) -> float:
        return sum(work.floor(device, dtype) for work in works)

    def rates(works: list[Work], name: str, floor: float) -> list[Row]:
        operations = sum(work.operations for work in works)
        rate = [operations / value for value in [*values(name), floor]]
        what = {"denoise": "denoising", "decode": "decoding"}[name]
        return [
            Row(f"{what}, TFLOP/s", [r / 1e12 for r in rate[:-1]], rate[-1] / 1e12, _digits(peak), compared=False),
            Row(
                f"{what}, % of the peak", [100 * r / peak for r in rate[:-1]], 100 * rate[-1] / peak, 1, compared=False
            ),
        ]

    per_block = len(latents) // len(blocks)
    denoise, block, decode, decode_block = map(floor, (blocks, blocks[-1:], latents, latents[-per_block:]))
    num_frames = clip.batch_size * (clip.num_frames - 1) / (len(latents) - 1) * per_block if len(latents) > 1 else 1
    return [
        Row(f"denoising {clip.num_frames} frames, s", values("denoise"), denoise),
        Row("its last block, s", values("block"), block),
        Row(f"decoding {clip.num_frames} frames, s", values("decode"), decode),
        Row("decoding a block, s", values("decode_block"), decode_block),
        Row("first frames, text included, s", values("first_frames")),
        Row(
            "frames/s of a stream at its end",
            values("frames_per_second"),
            num_frames / (block + decode_block),
            digits=1,
            more_is_faster=True,
        ),
        *rates(blocks, "denoise", denoise),
        *rates(latents, "decode", decode),
        *([Row("peak memory, GB", values("gpu_memory"), digits=1, compared=False)] if device.type == "cuda" else []),
    ]


def _digits(peak: float) -> int:
    return 0 if peak > 1e14 else 3


def compare(
    pipe: CausalWanPipeline,
    device: torch.device,
    prompt: str,
    clip: Clip,
    repetitions: int = 3,
    others: Sequence[Clip] = (),
    profile: bool = False,
) -> dict[str, Measurement]:
    """Measures the columns one after the other, prints the tables, and returns what the first is made of, by column.

    `others` are only generated as a whole, each with its kernels chosen before. After this the pipeline is compiled.
    """
    dtype = pipe.transformer.dtype
    prompt_embeds = pipe.encode_prompt(prompt)
    pipe.maybe_free_model_hooks()
    kernels = attention_kernels(pipe.transformer.config.attention_head_dim, device, dtype)
    results: dict[str, Measurement] = {}
    scaling: dict[str, list[float | None]] = {}
    profiles: dict[str, str] = {}
    compiling = 0.0
    for name in [*kernels, OURS, COMPILED]:
        column = Column(name, pipe)
        if name in kernels:
            column = Column(f"published way, {name}", pipe, PublishedWay(pipe, kernels[name]))
        if name == COMPILED:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
            start = clock()
            for _ in column.denoise(clip, prompt_embeds):
                pass
            compiling = clock() - start
        result = results[column.name] = column.measure(clip, prompt, repetitions)
        # The table comes minutes later.
        parts = f"denoising {result.denoise:.3f} s, its last block {result.block:.3f}, decoding {result.decode:.3f}"
        print(f"{column.name}: {parts}", file=sys.stderr, flush=True)
        scaling[column.name] = [_seconds(column, other, prompt_embeds) for other in others]
        if profile:
            profiles[column.name] = _profile(column, clip, prompt_embeds)
    compiling -= results[COMPILED].denoise

    peak = peak_rate(device, dtype)
    num_latents = num_latents_of(pipe.vae, clip.num_frames)
    blocks = denoising(pipe, clip.batch_size, **clip.sizes)
    latents = decoding(pipe.vae, clip.batch_size, num_latents, clip.height, clip.width)
    pairs = [(yardstick, len(results) - 1) for yardstick in range(len(kernels))]
    rows = rows_of(clip, list(results.values()), blocks, latents, device, dtype, peak)
    print(
        f"{device_name(device)}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {clip.batch_size} x "
        f"{clip.num_frames} frames of {clip.height}x{clip.width}. Compiling took {max(compiling, 0):.1f} s. "
        f"The peak, a large product of matrices, is {peak / 1e12:.{_digits(peak)}f} TFLOP/s; the clip takes "
        f"{sum(work.operations for work in blocks) / 1e12:.3g} TFLOP of denoising and "
        f"{sum(work.operations for work in latents) / 1e12:.3g} of decoding.\n"
    )
    print(markdown_table([["", *results, "times faster", "floor"], *(row.cells(pairs) for row in rows)]))
    if others:
        label = "{0.batch_size} x {0.num_frames} frames, s"
        rows = [
            Row(label.format(clip), [scaling[name][i] for name in results]).cells(pairs)[:-1]
            for i, clip in enumerate(others)
        ]
        print("\n" + markdown_table([["denoised and decoded", *results, "times faster"], *rows]))
    for name, text in profiles.items():
        print(f"\n{name}\n\n{text}")
    return results


def _seconds(column: Column, clip: Clip, prompt_embeds: torch.Tensor) -> float | None:
    """Of a clip; `None` if it does not fit into memory."""
    config = column.pipe.transformer.config
    # For the first time to choose kernels, which are others as long as the window grows.
    grows = None if config.local_attn_size == -1 else config.local_attn_size // config.num_frames_per_block + 2
    forget_peak()
    try:
        for _ in itertools.islice(column.generate(clip, prompt_embeds), grows):
            pass
        return sum(timed(column.generate(clip, prompt_embeds)))
    except torch.OutOfMemoryError:
        return None


def _profile(column: Column, clip: Clip, prompt_embeds: torch.Tensor) -> str:
    """The kernels of the last block and of decoding it."""
    latents = list(column.denoise(clip, prompt_embeds))
    denoised = kernel_times(iter(column.denoise(clip, prompt_embeds)), len(latents))
    decoded = kernel_times(column.decode(latents), len(latents))
    number = "launches" if column.pipe.device.type == "cuda" else "operators"
    rows = [["", "last block, ms", number, "decoding it, ms", number]]
    for kind in denoised:
        if denoised[kind].number or decoded[kind].number:
            rows.append([kind, *_cells([denoised[kind]]), *_cells([decoded[kind]])])
    rows.append(["all", *_cells(denoised.values()), *_cells(decoded.values())])
    return markdown_table(rows)


def _cells(times: Iterable[KernelTime]) -> list[str]:
    times = list(times)
    return [f"{sum(time.ms for time in times):.1f}", str(sum(time.number for time in times))]
