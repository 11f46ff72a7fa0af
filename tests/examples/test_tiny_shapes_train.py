"""The recipe of the embedded model, at a size where nothing is learnt but everything runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file


RECIPE = Path(__file__).parents[2] / "examples" / "tiny_shapes"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    yield
    for name in ("autoencoder", "denoiser", "optimize", "text", "train"):
        sys.modules.pop(name, None)


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


@pytest.mark.slow
def test_recipe_makes_a_pipeline(tmp_path):
    import train

    sizes = "--num_clips 64 --num_trajectories 4 --distill_steps 2 --batch_size 2 --num_eval 2"
    train.main(f"--output_dir {tmp_path} --autoencoder_steps 2 --flow_steps 2 {sizes}".split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["student_4_steps"].keys() >= {"prompt_match", "color", "shape", "background", "direction"}
    assert (tmp_path / "student_4_steps_93_frames.png").stat().st_size > 0
    assert len((tmp_path / "prompts" / "test.txt").read_text().splitlines()) == 62
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle moves right on a blue background", output_type="pt").frames
    assert video.shape == (1, 21, 3, 64, 64) and video.isfinite().all()

    # Distilling the same teacher again, and nothing else, ends with the same weights.
    again = tmp_path / "again"
    train.main(f"--output_dir {again} --teacher {tmp_path / 'teacher'} {sizes}".split())
    weights, expected = (load_file(p / "transformer/diffusion_pytorch_model.safetensors") for p in (again, tmp_path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not (again / "teacher").exists()
