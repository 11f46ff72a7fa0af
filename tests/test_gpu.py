"""What only a GPU can show. `pytest tests -m gpu`"""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import astrolabe_diffusers
from astrolabe_diffusers import TINY_SHAPES, CausalWanKVCache
from astrolabe_diffusers.models.attention import attend, attend_with_shared_past
from astrolabe_diffusers.pipelines.block_generation import draw_noise
from tests.layouts.test_lora_modules import distilled
from tests.tiny_pipeline import tiny_pipeline


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("diffusers_norm")]
PROMPT = "a yellow circle moves down on a black background"


def load(dtype=torch.float32):
    pipe = DiffusionPipeline.from_pretrained(TINY_SHAPES, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator():
    return torch.Generator("cpu").manual_seed(0)


def test_the_same_video_as_on_the_cpu():
    """With a generator on the CPU the noise is the same, and float32 without TF32 leaves rounding only."""
    torch.backends.cudnn.allow_tf32 = False
    expected = load()(PROMPT, generator=generator(), output_type="pt").frames
    video = load().to("cuda")(PROMPT, generator=generator(), output_type="pt").frames.cpu()
    assert (video - expected).abs().max() < 1e-2


def test_noise_of_a_published_seed():
    """The originals draw bfloat16, frames before channels: a whole video, then steps of three frames."""
    ours, theirs = (torch.Generator("cuda").manual_seed(7) for _ in range(2))
    for frames in (21, 3, 3):
        drawn = torch.randn(1, frames, 16, 60, 104, generator=theirs, device="cuda", dtype=torch.bfloat16)
        noise = draw_noise((1, 16, frames, 60, 104), ours, torch.device("cuda"), torch.bfloat16)
        assert torch.equal(noise.transpose(1, 2), drawn.float())


@pytest.mark.parametrize("number", [1, 2])
def test_noise_from_the_cpu_is_not_waited_for(number):
    """It is that of generators on the CPU, drawn while the GPU is busy."""
    shape, device = (number, 4, 3, 8, 6), torch.device("cuda")
    ours, theirs = ([torch.Generator().manual_seed(seed) for seed in range(number)] for _ in range(2))
    try:
        drawn = []
        for _ in range(3):
            drawn.append(draw_noise(shape, ours, device, torch.bfloat16, non_blocking=True))
            # The first one takes memory.
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for noise in drawn:
        assert torch.equal(noise.cpu(), draw_noise(shape, theirs, torch.device("cpu"), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stream_equals_call(dtype):
    pipe = load(dtype).to("cuda")
    whole = pipe([PROMPT] * 3, num_frames=57, generator=generator(), output_type="pt").frames
    pieces = list(pipe.stream([PROMPT] * 3, num_frames=57, generator=generator(), output_type="pt"))
    assert torch.equal(torch.cat(pieces, dim=1), whole) and whole.isfinite().all()


def video(pipe):
    return pipe(PROMPT, num_frames=33, generator=generator(), output_type="pt").frames.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method,arguments",
    [
        ("enable_model_cpu_offload", {}),
        ("enable_sequential_cpu_offload", {}),
        ("enable_group_offload", {"offload_type": "leaf_level", "use_stream": True}),
        ("enable_group_offload", {"offload_type": "block_level", "num_blocks_per_group": 1}),
        ("enable_group_offload", {"offload_type": "leaf_level", "exclude_modules": ["vae"]}),
    ],
)
def test_offloading_changes_nothing(dtype, method, arguments):
    expected = video(load(dtype).to("cuda"))
    pipe = load(dtype)
    if method == "enable_group_offload":
        arguments = {"onload_device": torch.device("cuda"), **arguments}
    getattr(pipe, method)(**arguments)
    for _ in range(2):
        # Layers that hooks load are called one by one, and an offloaded autoencoder is diffusers' own: both round
        # otherwise than kernels over several layers. In bfloat16 that moves edges, by .19 of a pixel on an H100.
        difference = (video(pipe) - expected).abs()
        assert difference.mean() < 0.005
        assert dtype == torch.bfloat16 or difference.max() < 0.02
    where = {p.device.type for p in pipe.text_encoder.parameters()}
    assert where == {"meta" if "sequential" in method else "cpu"}


def test_two_experts_stay_while_a_video_is_made():
    """With whole models offloaded: they take turns, and none has to make room for the other."""
    pipe = load()
    pipe.memory_transformer = load().transformer
    expected, places = video(pipe.to("cuda")), []

    def where():
        return {expert.device.type for expert in pipe.experts.values()}

    pipe.to("cpu").enable_model_cpu_offload()
    arguments = {"num_frames": 33, "generator": generator(), "output_type": "pt"}
    result = pipe(PROMPT, callback_on_step_end=lambda *_: places.append(where()) or {}, **arguments).frames.cpu()
    assert (result - expected).abs().mean() < 0.005
    # The memory transformer first comes with the second block.
    assert places[-1] == {"cuda"} and places.count({"cuda"}) == len(places) * 2 // 3
    assert where() == {"cpu"}


def test_tiles_on_the_gpu():
    pipe = load().to("cuda")
    pipe.vae.enable_tiling(48, 48, 32, 32)
    assert (video(pipe) - video(load().to("cuda"))).abs().mean() < 0.05


BACKENDS = (
    "native",
    "_native_cudnn",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flash",
    "_flash_3",
    "sage",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_backend_that_is_present(backend):
    pipe = load(torch.bfloat16).to("cuda")
    expected = video(pipe)
    # diffusers sets the choice for the whole process as well; the context takes it back.
    with attention_backend("native"):
        try:
            pipe.transformer.set_attention_backend(backend)
        except (RuntimeError, ImportError) as error:
            pytest.skip(str(error).splitlines()[0])
        difference = (video(pipe) - expected).abs()
    assert difference.mean() < 0.02


def test_cudnn_attends_by_default():
    query, key = torch.randn(2, 1, 4680, 12, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    expected = {}
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            expected[kernel] = scaled_dot_product_attention(q, k, k).transpose(1, 2)
    result = attend(query, key, key)
    assert torch.equal(result, expected[SDPBackend.CUDNN_ATTENTION])
    assert not torch.equal(result, expected[SDPBackend.FLASH_ATTENTION])


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype,tolerance,has_cudnn",
    [(torch.float32, 1e-5, True), (torch.bfloat16, 5e-3, True), (torch.bfloat16, 5e-3, False)],
)
def test_a_shared_past_is_attended_to_in_one_call(dtype, tolerance, has_cudnn, monkeypatch):
    """Against one attention over both, and without a copy of the past for every video; also where cuDNN cannot."""
    if not has_cudnn:
        monkeypatch.setattr("astrolabe_diffusers.models.attention.can_use_cudnn_attention", lambda params: False)
    query, key, value = (torch.randn(4, 700, 12, 128, device="cuda", dtype=dtype) for _ in range(3))
    past = [torch.randn(1, 9000, 12, 128, device="cuda", dtype=dtype) for _ in range(2)]
    keys, values = (torch.cat([p.expand(4, -1, -1, -1), x], dim=1) for p, x in zip(past, (key, value)))
    expected = attend(query, keys, values)
    del keys, values
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = attend_with_shared_past(query, past, (key, value))
    assert (result - expected).abs().max() < tolerance
    assert torch.cuda.max_memory_allocated() - before < 4 * past[0].nbytes


def test_an_ended_stream_leaves_no_memory():
    pipe = load(torch.bfloat16).to("cuda")
    prompt_embeds = pipe.encode_prompt(PROMPT)
    gc.disable()
    try:
        allocated = []
        for step in range(4):
            stream = pipe.stream(prompt_embeds=prompt_embeds, num_frames=93, output_type="pt")
            next(stream)
            if step % 2:
                list(stream)
            stream.close()
            del stream
            allocated.append(torch.cuda.memory_allocated())
        # The first leaves what libraries keep for themselves.
        assert allocated[1:] == [allocated[1]] * 3
    finally:
        gc.enable()


@torch.no_grad()
def test_denoising_never_waits_for_the_device():
    """Reading and writing the cache, in two passes or one, with rolling and the shift of the sink."""
    pipe = load(torch.bfloat16).to("cuda")
    transformer, n = pipe.transformer, pipe.transformer.config.num_frames_per_block
    text = pipe.encode_prompt(PROMPT)
    latents = torch.randn(1, transformer.config.in_channels, n, 6, 6, device="cuda", dtype=torch.bfloat16)
    timestep = torch.full((1,), 625.0, device="cuda")
    inputs = {"read": latents, "write": latents, "store+read": torch.cat([latents, latents], dim=2)}
    try:
        for modes in (("read", "write"), ("read", "store+read")):
            cache = CausalWanKVCache(transformer.config.num_layers)
            for block in range(8):
                # The first blocks allocate the slots and compile kernels.
                torch.cuda.set_sync_debug_mode("error" if block > 1 else "default")
                for mode in modes:
                    arguments = dict(kv_cache=cache, kv_cache_mode=mode, frame_offset=block * n)
                    transformer(inputs[mode], timestep, text, **arguments)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("order", ["load, offload", "offload, load"])
@pytest.mark.parametrize("offload", ["group", "sequential", "model"])
def test_offloaded_with_a_lora_of_whole_differences(offload, order, tmp_path):
    """Whatever brings parameters to the GPU, and takes them back, does it with what is added to norms and tables."""
    path, *_ = distilled(tmp_path)

    def video(*steps):
        pipe = tiny_pipeline(num_frames=33)
        for step in steps:
            step(pipe)
        return pipe(PROMPT, generator=generator(), output_type="latent").frames.cpu()

    def load_lora(pipe):
        pipe.load_lora_weights(path)

    def enable(pipe):
        if offload == "group":
            pipe.enable_group_offload(
                torch.device("cuda"), offload_type="leaf_level", use_stream=True, exclude_modules=["vae"]
            )
        else:
            getattr(pipe, f"enable_{offload}_cpu_offload")()

    steps = (load_lora, enable) if order.startswith("load") else (enable, load_lora)
    assert (video(*steps) - video(load_lora, lambda pipe: pipe.to("cuda"))).abs().max() < 1e-5


def test_a_long_stream_has_flat_memory():
    pipe = load(torch.bfloat16).to("cuda")
    num_frames = 1 + 4 * (3 * 60 - 1)
    noise = torch.empty(1, pipe.transformer.config.in_channels, 180, 6, 6)
    peaks = []
    for _ in pipe.stream(PROMPT, num_frames=num_frames, latents=noise.normal_(), output_type="pt"):
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    assert len(peaks) == 60 and max(peaks[10:]) <= 1.01 * min(peaks[10:])


def test_training_in_bf16(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(astrolabe_diffusers.__file__).parents[1] / "examples"))
    import train_nft

    arguments = (
        f"--config tiny_shapes --output_dir {tmp_path} --mixed_precision bf16 --gradient_checkpointing "
        "--max_train_steps 2 --eval_steps 2 --num_eval_prompts 2 --num_eval_videos 0 --report_to none"
    )
    assert train_nft.main(arguments.split()) == 0
    sys.modules.pop("train_nft")
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["grad_norm"] > 0 for m in metrics)
    before = load(torch.bfloat16).to("cuda")
    after = load(torch.bfloat16).to("cuda")
    after.load_lora_weights(tmp_path)
    videos = [pipe(PROMPT, generator=generator(), output_type="latent").frames for pipe in (before, after)]
    assert not torch.equal(*videos)
