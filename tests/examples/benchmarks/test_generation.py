"""The measurements, on the random tiny pipeline: what is measured, not how fast it is."""

import dataclasses

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel, StreamingTinyDecoder
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.pipelines.loading import load_from
from astrolabe_diffusers.pipelines.quantization import quantization_config
from tests.tiny_decoder_files import tiny_decoder_tensors
from tests.tiny_pipeline import SMALL, save_tiny_pipeline, tiny_pipeline


ONE_LAYER = {**SMALL, "num_layers": 1}


@pytest.fixture
def streams(monkeypatch):
    """The number of blocks that every stream has given, of the streams in the order they were made."""
    counts, make = [], CausalWanPipeline.stream

    def stream(*args, **kwargs):
        counts.append(0)
        blocks, index = make(*args, **kwargs), len(counts) - 1
        take = blocks.__class__.__next__

        class Counted(blocks.__class__):
            def __next__(self):
                piece = take(self)
                counts[index] += 1
                return piece

        blocks.__class__ = Counted
        return blocks

    monkeypatch.setattr(CausalWanPipeline, "stream", stream)
    return counts


def test_parts_add_up(streams):
    from generation import measure

    result = measure(tiny_pipeline(**ONE_LAYER), repetitions=2, prompt="a [.75s] | b [1.5s]")
    assert all(value > 0 for name, value in dataclasses.asdict(result).items() if name != "gpu_memory")
    assert result.denoise > result.first_block + result.block and result.decode > result.decode_block
    # One to compile; then twice with decoding, twice without.
    assert streams == [3] * 5


def test_streams_take_turns(streams):
    from generation import measure_streams

    result = measure_streams(tiny_pipeline(**ONE_LAYER), 3, prompt="a", num_frames=57)
    assert streams == [2, 5, 5, 5]
    # Twelve frames a block.
    assert result.frames_per_second == pytest.approx(12 / result.block)


def test_a_folder_or_a_recipe(model_folder, monkeypatch, tmp_path, capsys):
    import generation

    sizes = ["--num_frames", "9", "--height", "16", "--width", "32", "--repetitions", "1", "--device", "cpu"]
    for flag in ("--model", "--pipeline"):
        result = generation.main([flag, str(model_folder), "--dtype", "float32", *sizes])
        assert f"first_frames {result.first_frames:.3f}  " in capsys.readouterr().out and result.decode > 0
    # A published model is a recipe, also under the flag that it once had; a folder of its name is the folder.
    monkeypatch.setattr(generation, "random_pipeline", lambda recipe, *_: print(recipe) or tiny_pipeline(**ONE_LAYER))
    for flag in ("--recipe", "--model"):
        generation.main([flag, "longlive", *sizes])
        assert capsys.readouterr().out.startswith("longlive\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "longlive").symlink_to(model_folder)
    generation.main(["--model", "longlive", "--dtype", "float32", *sizes])
    assert not capsys.readouterr().out.startswith("longlive")
    with pytest.raises(UserError, match="there is no 'self-forcin'.*self-forcing"):
        generation.main(["--recipe", "self-forcin"])


def test_tiny_decoders(model_folder, tmp_path, monkeypatch):
    """Of a file, and random ones: it is what is timed."""
    import generation

    file, pieces, decode = tmp_path / "taew2_1.pth", [], StreamingTinyDecoder.decode
    torch.save(tiny_decoder_tensors(), file)
    monkeypatch.setattr(StreamingTinyDecoder, "decode", lambda *args: pieces.append(args) or decode(*args))
    flags = ["--model", str(model_folder), "--dtype", "float32", "--num_frames", "9", "--device", "cpu"]
    for decoder in ("random", str(file)):
        pieces.clear()
        result = generation.main([*flags, "--repetitions", "1", "--tiny_decoder", decoder])
        # To compile and once, by itself and in a stream.
        assert len(pieces) == 3 and result.decode > 0
    with pytest.raises(UserError, match="takes no --num_streams or --tiny_decoder"):
        generation.main([*flags, "--baseline", "--tiny_decoder", "random"])


def test_quantization(model_folder, monkeypatch, capsys):
    """The error is that of the rounded weights; what is timed has them, and is compiled."""
    pytest.importorskip("torchao")
    import generation

    config = quantization_config("int8_weight_only", torch.device("cpu"))
    timed, first = [], {}
    for name, quantized in (("plain", None), ("rounded", config)):
        pipe = load_from(str(model_folder), dtype=torch.bfloat16, quantization_config=quantized)
        noise = torch.randn(1, 3, 4, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().transpose(1, 2)
        arguments = {"prompt": "a red circle", "num_frames": 9, "height": 16, "width": 32}
        with torch.no_grad():
            embeds = pipe.encode_prompt("a red circle")
            flow = pipe.transformer(noise, torch.tensor([1000]), embeds).sample.float()
        generator = torch.Generator().manual_seed(0)
        latents = pipe(**arguments, latents=noise.float(), generator=generator, output_type="latent").frames
        first[name] = flow, latents
    expected = [((b - a).norm() / a.norm()).item() for a, b in zip(*first.values())]
    measure = generation.measure

    def keep(pipe, *args, **kwargs):
        timed.append(pipe)
        return measure(pipe, *args, **kwargs)

    monkeypatch.setattr(generation, "measure", keep)
    monkeypatch.setattr(CausalWanPipeline, "compile", lambda pipe, **kwargs: timed.append(kwargs) or 7.0)
    flags = ["--model", str(model_folder), "--device", "cpu", "--repetitions", "1", "--prompt", "a red circle"]
    flags += ["--num_frames", "9", "--height", "16", "--width", "32"]
    generation.main([*flags, "--quantization", "int8_weight_only", "--compile"])
    line, compiled, *_ = capsys.readouterr().out.splitlines()
    assert line == f"relative error of the flow {expected[0]:.4f}  relative error of the latents {expected[1]:.4f}"
    assert compiled == "compiled in 7 s" and min(expected) > 0
    assert timed[0]["height"] == 16 and timed[1].transformer.blocks[0].ffn.net[2].weight.dequantize() is not None
    with pytest.raises(UserError, match="--quantization needs --dtype bfloat16, not float32"):
        generation.main([*flags, "--quantization", "int8_weight_only", "--dtype", "float32"])
    with pytest.raises(UserError, match="float8 needs a GPU"):
        generation.main([*flags, "--quantization", "float8"])
    with pytest.raises(UserError, match="takes no --compile or --quantization"):
        generation.main([*flags, "--quantization", "float8", "--baseline"])


def test_random_weights_are_of_the_recipe(monkeypatch):
    """At the width of a head; the configs are the published ones."""
    import random_models

    monkeypatch.setattr(random_models, "WAN_SIZES", {"1.3B": dict(num_attention_heads=1, num_layers=1, ffn_dim=8)})
    monkeypatch.setattr(random_models, "UMT5_XXL", dict(vocab_size=300, d_model=16, d_kv=4, d_ff=8, num_layers=1))
    monkeypatch.setattr(random_models, "AutoencoderKLWan", lambda: tiny_pipeline().vae)
    pipe = random_models.random_pipeline("longlive", "cpu")
    assert (pipe.transformer.config.sink_size, pipe.config.num_frames) == (3, 477)
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert pipe.transformer.scale_shift_table.dtype == torch.float32
    weight = pipe.transformer.blocks[0].attn1.to_q.weight.float()
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    assert all((p == 1).all() for name, p in pipe.transformer.named_parameters() if name.endswith("norm_q.weight"))
    # Drawn here and kept elsewhere.
    pipe = random_models.random_pipeline("longlive", "cpu", home="meta")
    models = (pipe.transformer, pipe.text_encoder, pipe.vae)
    assert {p.device.type for model in models for p in model.parameters()} == {"meta"}


def test_memory_of_a_smaller_card(model_folder, monkeypatch):
    """What a CPU can say of it: that it has none, and what was asked for when there is not enough."""
    import generation

    flags = ["--model", str(model_folder), "--device", "cpu"]
    with pytest.raises(UserError, match="^--memory_gb needs a CUDA device: cpu has no limit.$"):
        generation.main([*flags, "--memory_gb", "16"])

    def measure(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(generation, "measure", measure)
    with pytest.raises(UserError, match="^out of memory: --model .* --device cpu --prompt 'a boat'$"):
        generation.main([*flags, "--prompt", "a boat"])


@pytest.mark.gpu
def test_memory_of_a_smaller_gpu(tmp_path):
    import generation

    folder = save_tiny_pipeline(tmp_path, **SMALL, num_layers=1, attention_head_dim=64)
    flags = ["--model", str(folder), "--num_frames", "9", "--repetitions", "1"]
    with pytest.raises(UserError, match="^out of 0.001 GB: --model .* --memory_gb 0.001$"):
        generation.main([*flags, "--memory_gb", "0.001"])
    with pytest.raises(UserError, match="--memory_gb 1e.06: it can be more than 0, up to the card's"):
        generation.main([*flags, "--memory_gb", "1000000"])
    # The limit is gone with the run.
    assert generation.main(flags).gpu_memory > 0.001


@pytest.mark.gpu
def test_what_is_offloaded_is_never_whole_on_the_gpu(monkeypatch):
    import random_models

    monkeypatch.setattr(random_models, "WAN_SIZES", {"1.3B": dict(num_attention_heads=4, num_layers=8, ffn_dim=2048)})
    sizes = dict(vocab_size=300, d_model=1024, d_kv=64, d_ff=2048, num_layers=8, num_heads=16)
    monkeypatch.setattr(random_models, "UMT5_XXL", sizes)
    monkeypatch.setattr(random_models, "AutoencoderKLWan", lambda: tiny_pipeline().vae)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipe = random_models.random_pipeline("self-forcing", "cuda", home="cpu")
    weights = [p.nbytes for model in (pipe.transformer, pipe.text_encoder) for p in model.parameters()]
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 0.2 * sum(weights)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table(model_folder, monkeypatch, capsys):
    import generation
    import operations

    monkeypatch.setattr(operations, "SECONDS_A_KERNEL", 0)
    compiled_with = []  # nothing is compiled, which would take half a minute
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "compile_repeated_blocks", lambda _, **kwargs: compiled_with.append(kwargs)
    )
    flags = ["--model", str(model_folder), "--dtype", "float32", "--device", "cpu", "--repetitions", "1", "--baseline"]
    clip = ["--num_frames", "21", "--height", "16", "--width", "32"]
    results = generation.main([*flags, *clip, "--batch_sizes", "1", "2", "--lengths", "33", "--profile"])
    about, _, *lines = capsys.readouterr().out.splitlines()
    assert "float32, 1 x 21 frames of 16x32" in about and " TFLOP/s; the clip takes " in about
    columns = ["published way, torch", "ours", "ours, compiled"]
    assert list(results) == columns and cells(lines[0]) == ["", *columns, "times faster", "floor"]
    rows = {label: values for label, *values in map(cells, lines[2 : lines.index("")])}
    assert list(rows) == [
        "denoising 21 frames, s",
        "its last block, s",
        "decoding 21 frames, s",
        "decoding a block, s",
        "first frames, text included, s",
        "frames/s of a stream at its end",
        "denoising, TFLOP/s",
        "denoising, % of the peak",
        "decoding, TFLOP/s",
        "decoding, % of the peak",
    ]
    published, _, compiled = results.values()
    assert rows["denoising 21 frames, s"][:3] == [f"{result.denoise:.3f}" for result in results.values()]
    assert rows["decoding 21 frames, s"][3] == f"{published.decode / compiled.decode:.2f}"
    assert rows["frames/s of a stream at its end"][3] == (
        f"{compiled.frames_per_second / published.frames_per_second:.2f}"
    )
    assert compiled_with == [{"fullgraph": True}]
    # The published code shows nothing before it has all.
    assert published.first_frames > published.denoise + published.decode
    # Twelve frames a block.
    assert published.frames_per_second == pytest.approx(12 / (published.block + published.decode_block))

    scaling = lines[lines.index("") + 1 :]
    assert cells(scaling[0])[0] == "denoised and decoded"
    assert [cells(line)[0] for line in scaling[2:5]] == [
        f"{size} frames, s" for size in ("1 x 21", "2 x 21", "1 x 33")
    ]
    assert all(float(cell) > 0 for line in scaling[2:5] for cell in cells(line)[1:])
    profiles = "\n".join(scaling[5:])
    for name in columns:
        assert f"\n{name}\n\n|" in profiles
    number = [int(cells(line)[2]) for line in scaling if line.startswith("| all")]
    assert len(number) == 3 and number[0] > number[1] == number[2] > 0


@pytest.mark.gpu
def test_the_table_of_a_gpu(tmp_path, capsys):
    """Compiled in earnest; heads of 64 are for both of the kernels that the published way is measured with."""
    import generation

    folder = save_tiny_pipeline(tmp_path, **SMALL, num_layers=1, attention_head_dim=64)
    clip = ["--num_frames", "33", "--height", "16", "--width", "32"]
    results = generation.main(["--model", str(folder), *clip, "--repetitions", "1", "--baseline", "--profile"])
    assert list(results) == ["published way, flash", "published way, cuDNN", "ours", "ours, compiled"]
    lines = capsys.readouterr().out.splitlines()
    assert "Compiling took 0.0 s" not in lines[0]
    assert any(line.startswith("| peak memory, GB") for line in lines)
    assert any(line.startswith("| compiled ") for line in lines[-8:])


def test_flags_of_the_table():
    from generation import main

    with pytest.raises(UserError, match="belong to --baseline"):
        main(["--recipe", "self-forcing", "--lengths", "81"])
    with pytest.raises(UserError, match="keeps all models on the device"):
        main(["--recipe", "self-forcing", "--baseline", "--offload", "model"])


def test_kinds_of_kernels():
    from kernel_time import kind_of

    for kernel, kind in {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
        "sm80_xmma_fprop_implicit_gemm_bf16f32_bf16f32_f32_nhwckrsc_nhwc_tilesize256x32x32": "convolutions",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x128>": "convolutions",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT": "products of matrices",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products of matrices",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>": "copies",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, 4>": "copies",
        "Memcpy DtoH (Device -> Pageable)": "copies",
        "triton_poi_fused_cat_convolution_copy_0": "compiled",
        "triton_per_fused__scaled_dot_product_cudnn_attention_mul_1": "compiled",
        "triton_tem_fused_flex_attention_backward_zeros_1": "attention",
        "void at::native::vectorized_layer_norm_kernel<float, float>": "other",
    }.items():
        assert kind_of(kernel) == kind, kernel
