"""What `training.py --baseline` prints: the published way, ours and ours compiled, on one card in one process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import comparison
import torch
from comparison import Clip, Row
from kernel_time import KernelTime, kernel_times
from measuring import clock, forget_peak, gpu_peak, timed
from operations import Attention, Linear, Work, attention_kernels, denoising, gradient
from published_training import PublishedTraining, frozen_policy
from published_way import PublishedWay

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.models.latent_frames import num_latents_of
from astrolabe_diffusers.reporting.machine import device_name
from astrolabe_diffusers.reporting.markdown import markdown_table
from astrolabe_diffusers.training.forward_process.noising import add_noise
from astrolabe_diffusers.training.nft import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.nft.trainer import NFTBatch, accumulate_gradients
from astrolabe_diffusers.training.policies import many_passes, use_policy


PARTS = ("gradient", "rollout", "decoding")
PUBLISHED, NOISY, OURS, COMPILED = "published way", "ours, noisy context", "ours", "ours, compiled"
ATTENTION, PRODUCTS = "attention", "products of matrices"


@dataclass
class Column:
    """One way of training, whose parts can be run by themselves."""

    name: str
    accumulate_gradients: Callable[[], object]
    generation: comparison.Column | None = None  # which samples and decodes, if another column's way does not
    policy: Callable[[str], AbstractContextManager] | None = None  # inside, it samples as this policy


@dataclass
class Measurement:
    """Seconds, medians over repetitions; memory is the peak in GB (1e9 bytes). What was not measured is `None`."""

    first: float | None = None  # a step's gradient, for the first time
    gradient: float | None = None  # a step's
    memory: float | None = None  # of a step's gradient
    kernels: dict[str, KernelTime] = field(default_factory=dict)  # of a step's gradient, by kind
    old: float | None = None  # a video's rollout
    base: float | None = None  # a video's, without a LoRA
    decode_block: float | None = None  # of all videos of a batch


def check(algorithm: str, config: NFTConfig, num_processes: int):
    """A [`UserError`] for what the published way has no counterpart of."""
    if algorithm != "nft":
        raise UserError(f"--baseline is of --algorithm nft, not {algorithm}.")
    if num_processes > 1:
        raise UserError(f"--baseline runs in one process, not {num_processes}.")
    if config.window_size is not None or config.loss_weighting != "none":
        raise UserError("--baseline trains whole clips, with --loss_weighting none: no --window_size.")
    if config.compile is not False:
        raise UserError("--baseline has a column that is compiled, and takes no --compile.")
    if config.context != "clean":
        raise UserError("--baseline has a column with the noisy context, and one with the clean one: no --context.")


def random_batch(trainer: NFTTrainer, latent_size: tuple[int, int, int]) -> NFTBatch:
    """Videos of noise with the text of noise, all of them trained and held to the reference."""
    pipe, size, device = trainer.pipeline, trainer.config.train_batch_size, trainer.accelerator.device
    model, randn = pipe.transformer.config, partial(torch.randn, device=device)
    clean, noise = randn(2, size, model.in_channels, *latent_size)
    sigma = trainer.sigmas[torch.arange(size) % len(trainer.sigmas)].to(device)
    ones = torch.ones(size, device=device)
    return NFTBatch(
        clean=clean,
        noisy=add_noise(clean, noise, sigma),
        sigma=sigma,
        timestep=1000 * sigma,
        prompt_embeds=randn(size, pipe.config.max_sequence_length, model.text_dim, dtype=pipe.transformer.dtype),
        optimality=torch.rand(size, device=device),
        weight=ones,
        kl_weight=ones,
        pipeline=pipe,
    )


def measure_gradient(column: Column, trainer: NFTTrainer, repetitions: int, profile: bool, result: Measurement):
    trainer.transformer.train()

    def step():
        trainer.optimizer.zero_grad()
        start = clock()
        column.accumulate_gradients()
        return clock() - start

    forget_peak()
    result.first = step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of what compiling took; the memory itself stays
    result.gradient = median(step() for _ in range(repetitions))
    result.memory = gpu_peak() or None
    if profile:
        result.kernels = kernel_times((step() for _ in range(1)), 1)
    trainer.optimizer.zero_grad()


def measure_rollout(column: Column, clip: Clip, prompt_embeds: torch.Tensor, result: Measurement):
    for policy in ("old", "base"):
        with column.policy(policy):
            for _ in range(2):  # the first one chooses kernels, or compiles them
                seconds = sum(timed(column.generation.denoise(clip, prompt_embeds)))
        setattr(result, policy, seconds / clip.batch_size)


def measure_decoding(column: Column, blocks: Sequence[torch.Tensor], repetitions: int, result: Measurement):
    times = [timed(column.generation.decode(list(blocks)))[-1] for _ in range(1 + repetitions)]
    result.decode_block = median(times[1:])


def measure(
    column: Column, trainer: NFTTrainer, batch: NFTBatch, repetitions: int, profile: bool, parts: Sequence[str]
) -> Measurement:
    """Says at once what it has measured."""
    config, result = trainer.config, Measurement()
    clip = Clip(config.train_batch_size, **trainer.size)

    def say(text: str):
        print(f"{column.name}: {text}", flush=True)

    if "gradient" in parts:
        measure_gradient(column, trainer, repetitions, profile, result)
        memory = f", peak memory {result.memory:.1f} GB" if result.memory else ""
        say(f"gradient {result.gradient:.3f} s, the first {result.first:.1f} s{memory}")
        if profile:
            say("  ".join(f"{kind} {time.ms / 1e3:.3f} s ({time.number})" for kind, time in result.kernels.items()))
    if "decoding" in parts and column.generation:
        blocks = batch.clean.split(trainer.transformer.config.num_frames_per_block, dim=2)[:3]
        measure_decoding(column, blocks, repetitions, result)
        say(f"decoding a block {result.decode_block:.3f} s")
    if "rollout" in parts and column.generation:
        measure_rollout(column, clip, batch.prompt_embeds[:1], result)
        say(f"rollout of a video, old policy {result.old:.3f} s, base {result.base:.3f} s")
    return result


def columns(trainer: NFTTrainer, batch: NFTBatch):
    """One after the other, for the last one compiles the model."""
    pipe, accelerator, config = trainer.pipeline, trainer.accelerator, trainer.config
    transformer, size = trainer.transformer, len(batch.clean)
    head_dim, device = transformer.config.attention_head_dim, accelerator.device
    # The published code calls flash-attn.
    kernel = next(iter(attention_kernels(head_dim, device, transformer.dtype).values()))

    @contextmanager
    def published_policy(policy: str):
        with frozen_policy(transformer, policy), accelerator.autocast():
            yield

    published = PublishedTraining(transformer, config, batch.clean.shape[2:], accelerator.autocast, kernel)
    yield Column(
        PUBLISHED,
        lambda: published.accumulate_gradients(batch, size),
        comparison.Column(PUBLISHED, pipe, PublishedWay(pipe, kernel)),
        published_policy,
    )

    def ours(config: NFTConfig) -> Callable[[], object]:
        def step():
            with many_passes(transformer):
                accumulate_gradients(accelerator, trainer.model, batch, config, size, True)

        return step

    generation = comparison.Column(OURS, pipe)
    policy = partial(use_policy, transformer, merge=config.merge_lora)
    yield Column(NOISY, ours(replace(config, context="noisy")))
    yield Column(OURS, ours(config), generation, policy)
    transformer.compile_repeated_blocks(fullgraph=True)
    num_blocks = batch.clean.shape[2] // transformer.config.num_frames_per_block
    # A clip of several passes would have each of them compiled.
    passes = config.num_pass_blocks if num_blocks <= config.num_pass_blocks else 1
    yield Column(COMPILED, ours(replace(config, blocks_per_pass=passes)), generation, policy)


def rows_of(
    trainer: NFTTrainer, results: Sequence[Measurement], profile: bool, parts: Sequence[str], rank: int
) -> list[Row]:
    config, device, dtype = trainer.config, trainer.accelerator.device, trainer.transformer.dtype
    size, rows = config.train_batch_size, []

    def values(name: str, of: Callable[[float], float] = float) -> list[float | None]:
        numbers = (getattr(result, name) for result in results)
        return [None if number is None else of(number) for number in numbers]

    if "gradient" in parts:
        recipe = {"checkpointing": config.gradient_checkpointing, "num_frozen": 1 + bool(config.kl_weight)}
        work = gradient(trainer.pipeline, size, **trainer.size, rank=rank, **recipe)
        floors = {
            kind: Work({kernel: n for kernel, n in work.items() if isinstance(kernel, kernels)}).floor(device, dtype)
            for kind, kernels in {ATTENTION: Attention, PRODUCTS: Linear}.items()
        }
        floor = sum(floors.values())
        rows += [
            Row("a step's gradient, s", values("gradient"), floor),
            Row("..., a sample, s", values("gradient", lambda x: x / size), floor / size),
        ]
        if device.type == "cuda":
            rows.append(Row("..., peak memory, GB", values("memory"), digits=1, compared=False))
        if profile:
            on_gpu, kinds = device.type == "cuda", [result.kernels for result in results]
            number = [sum(time.number for time in times.values()) for times in kinds]
            rows.append(Row("..., launches" if on_gpu else "..., operators", number, digits=0, compared=False))
            for name in (ATTENTION, PRODUCTS, "rest"):
                picked = [kind for kind in kinds[0] if kind == name or (name == "rest" and kind not in floors)]
                seconds = [sum(times[kind].ms for kind in picked) / 1e3 for times in kinds]
                rows.append(Row(f"..., {name}, s", seconds, floors.get(name)))
    if "rollout" in parts:
        blocks = denoising(trainer.pipeline, size, **trainer.size)
        floor = sum(block.floor(device, dtype) for block in blocks) / size
        rows += [
            Row("rollout of a video, the old policy, s", values("old"), floor),
            Row("..., the base, s", values("base"), floor),
        ]
    if "decoding" in parts:
        rows.append(Row("decoding a block for the rewards, s", values("decode_block")))
    return rows


def compare(
    trainer: NFTTrainer, repetitions: int = 2, profile: bool = False, parts: Sequence[str] = PARTS
) -> dict[str, Measurement]:
    """Measures the columns one after the other, prints the table, and returns what it is made of, by column. After
    this the transformer is compiled."""
    pipe, config, size = trainer.pipeline, trainer.config, trainer.size
    # Its memory would hide that of training.
    pipe.register_modules(text_encoder=None)
    scale = pipe.vae.config.scale_factor_spatial
    num_latents = num_latents_of(pipe.vae, size["num_frames"])
    batch = random_batch(trainer, (num_latents, size["height"] // scale, size["width"] // scale))
    rank = trainer.identity["rank"]
    device, dtype = trainer.accelerator.device, str(trainer.transformer.dtype).removeprefix("torch.")
    print(
        f"{device_name(device)}, torch {torch.__version__}, {dtype}, mixed precision "
        f"{trainer.accelerator.mixed_precision}, {config.train_batch_size} x {size['num_frames']} frames of "
        f"{size['height']}x{size['width']}, LoRA of rank {rank}, gradient checkpointing "
        f"{config.gradient_checkpointing}, {config.num_pass_blocks} blocks a pass",
        flush=True,
    )
    results = {}
    for column in columns(trainer, batch):
        results[column.name] = measure(column, trainer, batch, repetitions, profile, parts)
    rows = rows_of(trainer, list(results.values()), profile, parts, rank)
    pairs = [(0, column) for column in range(1, len(results))]
    table = [["", *results, "times faster", "floor"], *(row.cells(pairs) for row in rows)]
    print("\n" + markdown_table(table), flush=True)
    return results
