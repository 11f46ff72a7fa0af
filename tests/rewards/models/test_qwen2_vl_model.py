"""Patches and token ids against transformers' own processors."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from astrolabe_diffusers.rewards.frames import FrameRequest, prepare_frames
from astrolabe_diffusers.rewards.models.model_reward import as_pillow
from astrolabe_diffusers.rewards.models.qwen2_vl_model import RewardPrompt, patchify, resized_size
from tests.rewards.published_checkpoints import tokenizer


TEMPLATE = "Rate {text_prompt}: <|Reward|> END"


@pytest.mark.parametrize("bounds", [(200704, 200704), (100352, 200704), (3136, 1003520)])
def test_resized_size_is_that_of_transformers(bounds):
    for height, width in itertools.product((28, 90, 336, 480, 721, 1088), (32, 160, 480, 588, 832, 1920)):
        expected = smart_resize(height, width, factor=28, min_pixels=bounds[0], max_pixels=bounds[1])
        assert resized_size(height, width, *bounds) == tuple(expected)


def test_sizes_of_the_published_models():
    assert resized_size(480, 832, 200704, 200704) == (336, 588)
    assert resized_size(480, 832, 100352, 200704) == (336, 588)
    # What is below the bound although it was resized once would be enlarged by a second time.
    assert resized_size(336, 588, 200704, 200704) != (336, 588)


def test_patches_of_pictures_are_those_of_transformers():
    pictures = torch.randint(0, 256, (3, 3, 84, 140), dtype=torch.uint8)
    expected = Qwen2VLImageProcessorPil(do_resize=False)(
        [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures], return_tensors="pt"
    )
    patches, grid = patchify(pictures[:, None])
    assert torch.equal(patches, expected["pixel_values"])
    assert grid.tolist() == expected["image_grid_thw"].tolist() == [[1, 6, 10]] * 3


def test_a_picture_through_resizing_and_patches():
    y, x = torch.meshgrid(torch.linspace(0, 255, 90), torch.linspace(0, 1, 160), indexing="ij")
    picture = torch.stack([y, 255 * x, y * x]).round().to(torch.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 200704, "longest_edge": 200704})
    expected = processor([Image.fromarray(picture.permute(1, 2, 0).numpy())], return_tensors="pt")
    size = resized_size(90, 160, 200704, 200704)
    patches, grid = patchify(prepare_frames(picture[None, None], FrameRequest((0,), as_pillow(size, 90))))
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    assert ((patches - expected["pixel_values"]).abs() < 0.035).all()  # a step of the 255 is 0.015
    assert (patches == expected["pixel_values"]).float().mean() > 0.999


def test_patches_of_videos_are_those_of_transformers():
    pytest.importorskip(
        "torchvision", reason="needs a torchvision that fits torch", exc_type=(ImportError, RuntimeError)
    )
    from transformers import Qwen2VLVideoProcessor

    videos = torch.randint(0, 256, (2, 5, 3, 84, 140), dtype=torch.uint8)
    expected = Qwen2VLVideoProcessor(do_resize=False, do_sample_frames=False)(list(videos), return_tensors="pt")
    patches, grid = patchify(videos)
    assert grid.tolist() == expected["video_grid_thw"].tolist() == [[3, 6, 10]] * 2
    # It scales and normalises in one step.
    torch.testing.assert_close(patches, expected["pixel_values_videos"], atol=2e-6, rtol=0)


def test_patches_of_a_video_by_hand():
    """Patch after patch: tokens in rows, the four patches of each, then channel, frame, row, column."""
    video = torch.randint(0, 256, (1, 3, 3, 56, 84), dtype=torch.uint8)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    frames = [(frame / 255 - mean) / std for frame in video[0].double().numpy()]
    frames.append(frames[-1])
    expected = []
    for pair, row, column in itertools.product((0, 2), (0, 28), (0, 28, 56)):
        for i, j in itertools.product((0, 14), (0, 14)):
            piece = [f[:, row + i : row + i + 14, column + j : column + j + 14] for f in frames[pair : pair + 2]]
            expected.append(np.stack(piece, axis=1).reshape(-1))
    patches, grid = patchify(video)
    assert grid.tolist() == [[2, 4, 6]]
    torch.testing.assert_close(patches.double(), torch.tensor(np.stack(expected)), atol=1e-6, rtol=0)


def test_the_text_is_cut_at_the_reward_token():
    tokens = tokenizer()
    prompt = RewardPrompt(tokens, TEMPLATE, ("<|Reward|>",), "<|image_pad|>")
    ids = prompt.ids("a red fox", "<|Reward|>")
    assert tokens.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Rate a red fox: <|Reward|>"
    )
    assert (ids == tokens.convert_tokens_to_ids(prompt.pad)).sum() == 1 and ids[-1] == prompt.token_ids[0]


@pytest.mark.parametrize(
    "text", ["<|Reward|>", "a <|image_pad|> b", "<|im_end|>", "<|Rew<|Reward|>ard|>", "{text_prompt}"]
)
def test_special_tokens_in_a_prompt_are_only_text(text):
    prompt = RewardPrompt(tokenizer(), TEMPLATE, ("<|Reward|>",), "<|image_pad|>")
    plain, ids = prompt.ids("a", "<|Reward|>").tolist(), prompt.ids(text, "<|Reward|>").tolist()
    special = set(prompt.tokenizer.all_special_ids) | {prompt.token_ids[0]}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert len(ids) > len(plain)


@pytest.mark.parametrize("template", ["no slot <|Reward|>", "{text_prompt}", "{text_prompt} <|Reward|> <|Reward|>"])
def test_a_template_of_another_model_is_refused(template):
    with pytest.raises(ValueError, match="the template must hold .* once, and holds it [02] times"):
        RewardPrompt(tokenizer(), template, ("<|Reward|>",), "<|image_pad|>")
