"""The aesthetic predictor on a small CLIP, against transformers' processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from astrolabe_diffusers.rewards.models.aesthetic import Aesthetic
from tests.rewards.drawn_patterns import patterns
from tests.rewards.published_checkpoints import fill


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """CLIP's folder, the predictor's folder, and both models."""
    folder = tmp_path_factory.mktemp("aesthetic")
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    clip = fill(CLIPModel(CLIPConfig(
        text_config=dict(**small, vocab_size=20), vision_config=dict(**small, image_size=56, patch_size=14),
        projection_dim=24,
    )))  # fmt: skip
    clip.save_pretrained(folder / "clip")
    sizes = (24, 1024, 128, 64, 16, 1)
    # The places of the linear layers among those that only trained.
    layers = {place: fill(torch.nn.Linear(*pair)) for place, pair in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:]))}
    weights = {f"layers.{i}.{n}": t for i, layer in layers.items() for n, t in layer.state_dict().items()}
    (folder / "predictor").mkdir()
    torch.save(weights, folder / "predictor" / "sac+logos+ava1-l14-linearMSE.pth")
    return folder, clip, layers


@pytest.fixture(scope="module")
def reward(files):
    return Aesthetic(str(files[0] / "predictor"), str(files[0] / "clip"), device="cpu")


@pytest.mark.parametrize("size", [(90, 160), (100, 61)])
def test_against_the_processor_of_transformers(files, reward, size):
    _, clip, layers = files
    videos = patterns(frames=3, height=size[0], width=size[1])
    pictures = (videos.flatten(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels = processor([Image.fromarray(np.ascontiguousarray(p)) for p in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        x = clip.get_image_features(pixels).pooler_output
        x = x / x.norm(dim=1, keepdim=True)
        for layer in layers.values():
            x = layer(x)
    expected = x.view(2, 3).mean(1)
    output = reward.score(videos, ["a", "b"])
    torch.testing.assert_close(output.scores, expected, atol=2e-4, rtol=0)
    assert (expected[0] - expected[1]).abs() > 5e-3
    torch.testing.assert_close(output.info["mean"], output.scores)


def test_a_batch_scores_as_its_members(reward):
    videos = patterns(3, frames=2)
    alone = [reward.score(video[None], [""]).scores for video in videos]
    torch.testing.assert_close(reward.score(videos, [""] * 3).scores, torch.cat(alone), atol=1e-6, rtol=0)


def test_only_the_picture_half_is_kept(files, reward):
    kept = sum(p.numel() for p in reward.model["clip"].vision_model.parameters())
    assert kept == sum(p.numel() for p in files[1].vision_model.parameters())
    assert not any("text" in name for name, _ in reward.model.named_parameters())


def test_a_predictor_of_another_clip(files, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match=r"predictor does not fit.*missing.*layers.0.weight \(1024, 768\) for"):
        Aesthetic(str(tmp_path), str(files[0] / "clip"))
