"""HPSv2.1 on a small open_clip model, where open_clip is installed."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.rewards.hpsv2 import HPSv2
from tests.rewards.drawn_patterns import patterns
from tests.rewards.published_checkpoints import fill


PROMPTS = ["a red fox", "a dog runs over the snow"]


def test_without_open_clip_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"video_hpsv2_local needs open_clip: pip install 'astrolabe_diffusers\[rew"):
        HPSv2("nowhere")


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


def test_against_pillow_and_the_model_itself(open_clip, published):
    folder, model = published
    videos = patterns(frames=4, height=100)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS))
        expected = torch.zeros(2, 4)
        for i, video in enumerate(videos):
            for f, frame in enumerate(video):
                picture = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
                square = np.zeros((56, 56, 3), np.uint8)
                square[10:45] = np.array(picture.resize((56, 35), Image.Resampling.BICUBIC))  # 100 x 160, 11 rows left
                pixels = ((torch.tensor(square) / 255 - mean) / std).permute(2, 0, 1)[None]
                expected[i, f] = torch.cosine_similarity(model.encode_image(pixels)[0], texts[i], dim=0)
    output = HPSv2(str(folder), "tiny-hps", device="cpu").score(videos, PROMPTS)
    torch.testing.assert_close(output.scores, expected.max(1).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.info["mean"], expected.mean(1), atol=1e-4, rtol=0)
    assert (output.scores - output.info["mean"]).min() > 2e-4


def test_weights_that_do_not_fit(published, tmp_path):
    weights = dict(published[1].state_dict())
    del weights["ln_final.weight"]
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"does not fit tiny-hps: 1 missing \(ln_final.weight\)"):
        HPSv2(str(tmp_path), "tiny-hps")
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Z'"):
        HPSv2(str(published[0]), "ViT-Z")
