"""HPSv2.1 on a small open_clip model, where open_clip is installed."""

import json
import sys

import numpy as np
import pytest
import torch

from astrolabe_diffusers.rewards.models.hpsv2 import HPSv2, letterbox
from tests.rewards.drawn_patterns import patterns
from tests.rewards.published_checkpoints import fill
from tests.rewards.slow_resize import resize


PROMPTS = ["a red fox", "a dog runs over the snow"]


def test_without_open_clip_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"video_hpsv2_local needs open_clip: pip install 'astrolabe_diffusers\[rew"):
        HPSv2("nowhere")


def published_pictures(videos, side):
    """float64 [B, F, 3, side, side] of videos in [0, 1] that are as wide as 8/5 of their height: 256 steps, [0, 1],
    one resize in floats, and black above and below."""
    small = round(side / 1.6)
    above = (side - small) // 2
    pictures = np.zeros((*videos.shape[:3], side, side))
    pictures[..., above : above + small, :] = resize(np.round(videos.double().numpy() * 255) / 255, small, side)
    return pictures


def test_frames_are_resized_once_and_in_floats():
    # Black and white tiles, beside whose edges bicubic overshoots.
    tiles = torch.rand(1, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).round()
    videos = tiles.repeat_interleave(20, 3).repeat_interleave(20, 4)
    expected = published_pictures(videos, 56)[0]
    assert expected.min() < -0.01 and expected.max() > 1.01
    pictures = letterbox((videos[0] * 255).round().to(torch.uint8), 56)
    torch.testing.assert_close(pictures.double(), torch.tensor(expected), atol=5e-6, rtol=0)
    upright = letterbox((videos[0] * 255).round().to(torch.uint8).transpose(2, 3), 56)
    torch.testing.assert_close(upright, pictures.transpose(2, 3), atol=5e-6, rtol=0)


def test_frames_of_that_size_stay_as_they_are():
    frames = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    assert torch.equal(letterbox(frames, 56), frames.float() / 255)


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    open_clip = pytest.importorskip(
        "open_clip", reason="needs the extra `rewards`", exc_type=(ImportError, RuntimeError)
    )
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    path = tmp_path_factory.mktemp("open_clip") / "tiny-hps.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return open_clip


@pytest.fixture(scope="module")
def published(open_clip, tmp_path_factory):
    model = fill(open_clip.create_model("tiny-hps", pretrained=None, output_dict=True))
    folder = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder, model


def test_against_the_model_itself(open_clip, published):
    folder, model = published
    videos = patterns(frames=4, height=100)
    pictures = published_pictures(videos, 56)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS))
        expected = torch.zeros(2, 4)
        for i, video in enumerate(videos):
            for f in range(len(video)):
                pixels = (torch.tensor(pictures[i, f]).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
                pixels = pixels[None]
                expected[i, f] = torch.cosine_similarity(model.encode_image(pixels)[0], texts[i], dim=0)
    output = HPSv2(str(folder), "tiny-hps", device="cpu").score(videos, PROMPTS)
    torch.testing.assert_close(output.scores, expected.max(1).values, atol=5e-6, rtol=0)
    torch.testing.assert_close(output.info["mean"], expected.mean(1), atol=5e-6, rtol=0)
    assert (output.scores - output.info["mean"]).min() > 2e-4


def test_weights_that_do_not_fit(published, tmp_path):
    weights = dict(published[1].state_dict())
    del weights["ln_final.weight"]
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"does not fit tiny-hps: 1 missing \(ln_final.weight\)"):
        HPSv2(str(tmp_path), "tiny-hps")
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Z'"):
        HPSv2(str(published[0]), "ViT-Z")
