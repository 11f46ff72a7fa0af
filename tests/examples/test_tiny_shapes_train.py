"""The recipe of the embedded model, at a size where nothing is learnt but everything runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from astrolabe_diffusers.pipelines.scene_prompt import TRANSITIONS
from tests.tiny_pipeline import sharpen_transformer


RECIPE = Path(__file__).parents[2] / "examples" / "tiny_shapes"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    yield
    for path in RECIPE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@torch.no_grad()
def test_whole_clips_equal_the_class():
    """Training takes whole clips where the class goes through them piece by piece: the result is the same."""
    from autoencoder import build_autoencoder, decode_whole, encode_whole, whole_clips

    vae = build_autoencoder()
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    video = torch.rand(2, 3, 21, 64, 64) * 2 - 1
    latents = vae.encode(video).latent_dist.mean
    decoded = vae.decode(latents).sample
    with whole_clips(vae):
        assert (encode_whole(vae, video).mean - latents).abs().max() < 1e-5
        assert (decode_whole(vae, latents).clamp(-1, 1) - decoded).abs().max() < 1e-5
    assert decoded.std() > 0.1
    # The hooks are gone.
    assert torch.equal(vae.decode(latents).sample, decoded)


@torch.no_grad()
@pytest.mark.parametrize("recached", [False, True])
def test_teacher_forcing_of_two_scenes_equals_a_stream_whose_prompt_changes(recached):
    """Against the cache: clean blocks are written one by one, with the old caption before the switch, or all with the
    new one, and each noisy block reads what is there."""
    from denoiser import BLOCK, ClipBank, Denoiser, build_transformer
    from text import build_text_encoder, build_tokenizer, token_ids

    torch.manual_seed(0)
    tokenizer, channels, blocks = build_tokenizer(), 4, 4
    text_encoder = build_text_encoder(tokenizer)
    transformer = build_transformer(text_encoder.config.d_model, channels)
    sharpen_transformer(transformer, torch.Generator().manual_seed(0))
    model = Denoiser(text_encoder, transformer).eval()

    old = token_ids(tokenizer, ["a red circle moves left on a white background"] * 3)
    new = token_ids(tokenizer, ["a blue cross moves up and a green square moves down on a black background"] * 3)
    latents = torch.randn(3, channels, blocks * BLOCK, 2, 3)
    # The last clip has one scene, whose caption is in both places.
    bank = ClipBank(latents, torch.cat([old[:2], new[2:]]), new, torch.tensor([1, 3, 0]))
    clips = bank.clips(torch.arange(3), recached_share=float(recached))
    sigmas = torch.rand(3, blocks).repeat_interleave(BLOCK, dim=1)
    noisy = torch.randn_like(latents)
    flow = model(noisy, sigmas, clips)

    texts = {"old": model.embed(old[:1]), "new": model.embed(new[:1])}
    for i, switch in enumerate((1, 3, 0)):
        learnt = [block >= switch or not recached for block in range(blocks)]
        assert clips.counts[i].tolist() == learnt
        cache = transformer.new_kv_cache()
        for block in range(blocks):
            frames = slice(block * BLOCK, (block + 1) * BLOCK)
            text = texts["new" if block >= switch else "old"]
            arguments = {"kv_cache": cache, "frame_offset": block * BLOCK}
            parts = noisy[i : i + 1, :, frames], sigmas[i : i + 1, frames] * 1000
            expected = transformer(*parts, text, kv_cache_mode="read", **arguments).sample
            if learnt[block]:
                assert (flow[i : i + 1, :, frames] - expected).abs().max() < 1e-4
                other = texts["old" if block >= switch else "new"]
                wrong = transformer(*parts, other, kv_cache_mode="read", **arguments).sample
                assert (wrong - expected).abs().mean() > 0.01
            text = texts["new" if block >= switch or recached else "old"]
            clean = clips.context[i : i + 1, :, frames]
            transformer(clean, torch.zeros(1), text, kv_cache_mode="write", **arguments)


def regression():
    """A layer, and a loss that draws its batch and is 0 where the layer is the identity."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    def loss_fn():
        x = torch.randn(16, 4)
        return (layer(x) - x).square().mean()

    return layer, loss_fn


def test_a_stage_converges(tmp_path, monkeypatch):
    import optimize

    monkeypatch.setattr(optimize, "EMA_DECAY", 0.95)
    layer, loss_fn = regression()
    assert loss_fn() > 0.5
    optimize.optimize("fit", layer, loss_fn, 400, 0.05, 1, tmp_path / "fit.pt")
    assert loss_fn() < 1e-4


def test_an_interrupted_stage_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    import optimize

    monkeypatch.setattr(optimize, "SAVE_STEPS", 5)
    layer, loss_fn = regression()
    optimize.optimize("whole", layer, loss_fn, 18, 0.05, 1, tmp_path / "whole.pt")

    calls = []

    def interrupted():
        calls.append(0)
        if len(calls) == 14:
            raise RuntimeError("interrupted")
        return loss_again()

    resume = tmp_path / "resumed.pt"
    again, loss_again = regression()
    with pytest.raises(RuntimeError, match="interrupted"):
        optimize.optimize("broken", again, interrupted, 18, 0.05, 1, resume)
    assert torch.load(resume)["step"] == 10
    # Another process: other weights and random numbers.
    nn.init.zeros_(again.weight)
    torch.manual_seed(5)
    calls.clear()
    optimize.optimize("resumed", again, interrupted, 18, 0.05, 1, resume)
    # One step makes the optimizer's state.
    assert len(calls) == 1 + 8
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)


def weights(folder):
    return {path: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def equal(first, second):
    return all(torch.equal(first[path][name], second[path][name]) for path in first for name in first[path])


@pytest.mark.slow
def test_recipe_makes_a_pipeline(tmp_path, monkeypatch, capsys):
    import denoiser
    import figures
    import train

    for name, blocks in {"BEFORE": 1, "AFTER": 2, "MINUTE": 3, "TEN_SECONDS": 2}.items():
        monkeypatch.setattr(figures, name, blocks)
    monkeypatch.setattr(denoiser, "ODE_STEPS", 4)
    output = tmp_path / "made"
    steps = "--autoencoder_steps 2 --flow_steps 2 --distill_steps 2"
    arguments = (
        f"--output_dir {output} {steps} --num_clips 64 --num_trajectories 4 --batch_size 2 --num_eval 2".split()
    )
    train.main(arguments)
    measured = json.loads((output / "figures.json").read_text())
    assert measured["one_object"].keys() == {"match", "color", "shape", "background", "direction"}
    switches = {f"{kind}_{transition}" for kind in ("scene", "added") for transition in TRANSITIONS}
    numbers_of_objects = {"one_object", "two_objects", "three_objects"}
    assert measured.keys() == {"split", "videos", "minute"} | numbers_of_objects | switches
    lengths = {name: len(values) for name, values in measured["scene_roll"].items()}
    assert lengths == {"new": 2, "interval": 2, "old": 2, "empty": 2}
    assert len(measured["minute"]) == 2
    sheets = {path.name for path in output.glob("*.png")}
    assert sheets == {"held_out.png", "scene_roll.png", "added_roll.png"}
    for folder, number in ((".", 64), ("one_object", 31), ("two_objects", 64)):
        assert len((output / "prompts" / folder / "test.txt").read_text().splitlines()) == number
    assert json.loads((output / "seconds.json").read_text()).keys() == {"autoencoder", "flow_matching", "distillation"}
    assert not list(output.glob("*.pt"))
    for path in output.rglob("*.json"):
        assert str(output) not in path.read_text(), path  # the folder is published

    pipe = DiffusionPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle moves right and an orange cross moves up on a blue background", output_type="pt").frames
    assert video.shape == (1, 21, 3, 96, 96) and video.isfinite().all()

    made = weights(output)
    assert len(made) == 6  # of the teacher and of the student
    capsys.readouterr()
    train.main(arguments)
    assert capsys.readouterr().out == "" and equal(weights(output), made)

    # Stages whose results are gone, and no others, are run again and end with the same weights.
    for results, stages in {"transformer": {"distillation"}, "teacher": {"flow matching", "distillation"}}.items():
        (output / "model_index.json").unlink()
        shutil.rmtree(output / results)
        train.main(arguments)
        printed = capsys.readouterr().out
        assert {s for s in ("autoencoder", "flow matching", "distillation") if f"{s}      0/2" in printed} == stages
        assert equal(weights(output), made)
