"""VideoAlign's rewards at small size, in the layouts VideoReward is published in."""

import copy
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from astrolabe_diffusers.rewards import VideoAlign, get_reward
from astrolabe_diffusers.rewards.models.videoalign import _MODELS
from tests.rewards import published_checkpoints
from tests.rewards.drawn_patterns import patterns
from tests.rewards.published_checkpoints import ALPHA, NORMS, save_file


VQ, MQ, MQ_IN_COLOR, TA, OVERALL = (
    f"videoalign_{name}" for name in ("vq_score", "mq_score", "mq_rgb_score", "ta_score", "score")
)
PROMPTS = ["a red fox", "a dog runs over the snow and the ice"]
# VQ, MQ, TA of 81 frames, from transformers 4.45.2 and PEFT's own merge, its rotary embeddings cast to bfloat16 as the
# published code does it; with exact ones -0.4162247 is the first.
PUBLISHED = [[-0.4057513, -0.0034279, -0.0337068], [-0.3781996, 0.0194678, 0.0381506]]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return published_checkpoints.videoreward(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def make(published):
    def make(reward, checkpoint=published.folder, **options):
        options = {"checkpoint": str(checkpoint), "base": str(published.base), "device": "cpu"} | options
        return get_reward(reward, **options)

    # All rewards of these settings share its model.
    kept = make(TA)
    yield make
    del kept


def normalised(raw):
    """As the published code: less the mean, over the deviation."""
    names = ("VQ", "MQ", "TA")
    columns = [(raw[:, i] - NORMS[f"{n}_mean"]) / NORMS[f"{n}_std"] for i, n in enumerate(names)]
    return torch.stack(columns, 1)


def test_scores_are_those_of_the_published_code(make):
    videos, expected = patterns(frames=81), normalised(torch.tensor(PUBLISHED))
    rewards = [make(reward) for reward in (VQ, MQ_IN_COLOR, TA)]
    scores = torch.stack([reward.score(videos, PROMPTS).scores for reward in rewards], 1)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    overall = make(OVERALL).score(videos, PROMPTS)
    torch.testing.assert_close(overall.scores, expected.mean(1), atol=1e-5, rtol=0)
    assert list(overall.info) == ["VQ", "MQ", "TA"]


def drained(frames):
    """uint8 [B, F, 3, h, w] without colour, rounded down; in float32, as sums that are whole numbers show."""
    red, green, blue = (weight * x for weight, x in zip(np.float32([0.2989, 0.587, 0.114]), _channels(frames)))
    gray = np.floor(red + green + blue)[:, :, None]
    return torch.tensor(gray.repeat(3, axis=2)).to(torch.uint8)


def _channels(frames):
    return frames.numpy().astype(np.float32).transpose(2, 0, 1, 3, 4)


def test_gray_is_the_colour_pass_of_frames_that_were_gray_before_they_were_resized(make):
    videos = patterns(frames=12)
    gray, in_color = make(MQ), make(MQ_IN_COLOR)
    output = gray.score(videos, PROMPTS)
    assert list(output.info) == ["VQ", "MQ"]
    uint8 = (videos * 255).round().to(torch.uint8)
    places = torch.linspace(0, 11, 4).round().int().tolist()
    # As torchvision resizes frames of 256 steps; `test_frames.py` has it from the formula.
    small = F.interpolate(drained(uint8[:, places]).float().flatten(0, 1), (252, 448), mode="bicubic", antialias=True)
    published = small.clamp(0, 255).round().to(torch.uint8).unflatten(0, (2, 4))
    torch.testing.assert_close(output.scores, in_color.score(published, PROMPTS).scores, atol=1e-5, rtol=0)
    # The other order, and colour, are something else.
    other = in_color.score(drained(in_color.requested(videos)), PROMPTS).scores
    assert (output.scores - other).abs().min() > 1e-4
    assert (output.scores - in_color.score(videos, PROMPTS).scores).abs().min() > 0.05


def test_parts_can_be_chosen(make):
    videos = patterns(frames=12)
    both, quality, alignment = (
        make(reward, **options).score(videos, PROMPTS).scores
        for reward, options in ((OVERALL, {"dimensions": ["VQ", "TA"]}), (VQ, {}), (TA, {}))
    )
    torch.testing.assert_close(both, (quality + alignment) / 2)
    assert not make(OVERALL, dimensions=["VQ", "MQ"]).uses_prompt and make(OVERALL).uses_prompt
    for dimensions, gray in ((["SQ"], False), ([], False), ("VQ", False), (["TA"], True)):
        with pytest.raises(ValueError, match="dimensions of VideoAlign( in gray)? are of VQ, MQ"):
            make(OVERALL, dimensions=dimensions, gray=gray)


def test_frames_of_another_kind_are_refused(make):
    gray, in_color = make(MQ), make(MQ_IN_COLOR)
    videos = patterns(frames=4)
    with pytest.raises(ValueError, match="VideoAlign in gray was given frames of 3 channels"):
        gray.score(in_color.requested(videos), PROMPTS)
    with pytest.raises(ValueError, match="VideoAlign was given frames of 1 channels"):
        in_color.score(gray.requested(videos), PROMPTS)


def test_only_text_alignment_depends_on_the_prompt(make):
    videos = patterns(frames=12)
    rewards = {VQ: False, MQ: False, MQ_IN_COLOR: False, TA: True}
    scores = [[make(reward).score(videos, p).scores for reward in rewards] for p in (PROMPTS, ["b", "a fox " * 20])]
    for depends, one, other in zip(rewards.values(), *scores):
        assert ((one - other).abs() > 1e-4).all() if depends else ((one - other).abs() < 5e-6).all()


@pytest.mark.parametrize("reward", [MQ, OVERALL])
def test_a_batch_scores_as_its_members(make, reward):
    videos, prompts = patterns(3), ["a", PROMPTS[1], "a fox " * 30]
    batch = make(reward).score(videos, prompts).scores
    assert batch.unique().numel() == 3
    prepared = make(reward).requested(videos)
    channels = 1 if reward is MQ else 3
    assert prepared.dtype == torch.uint8 and prepared.shape == (3, 4, channels, 252, 448)
    assert torch.equal(batch, make(reward).score(prepared, prompts).scores)
    alone = [make(reward).score(videos[i : i + 1], prompts[i : i + 1]).scores for i in range(3)]
    torch.testing.assert_close(batch, torch.cat(alone), atol=1e-5, rtol=0)
    in_twos = make(reward, batch_size=2).score(videos, prompts).scores
    torch.testing.assert_close(batch, in_twos, atol=1e-5, rtol=0)


@pytest.fixture
def passes(make):
    """The number of clips that went through the model in each forward pass."""
    counts, reward = [], make(TA)
    hook = reward.model.register_forward_pre_hook(lambda module, arguments: counts.append(len(arguments[0])))
    yield counts
    hook.remove()


def test_all_rewards_share_one_model_and_two_passes(make, passes):
    rewards = [make(r) for r in (VQ, MQ, TA, OVERALL, MQ_IN_COLOR)]
    assert len({id(reward.model) for reward in rewards}) == 1
    videos = patterns(frames=10) * 0.9
    first = [reward.score(videos, PROMPTS).scores for reward in rewards]
    assert passes == [2, 2]
    assert all(torch.equal(reward.score(videos, PROMPTS).scores, scores) for reward, scores in zip(rewards, first))
    assert passes == [2, 2]


def test_another_batch_is_never_scored_as_the_last(make, passes):
    reward, gray = make(TA), make(MQ)
    videos = patterns(frames=10) * 0.8
    before = reward.score(videos, PROMPTS).scores
    assert not torch.equal(before, reward.score(videos, PROMPTS[::-1]).scores)
    gray.score(videos, PROMPTS), gray.score(videos, PROMPTS[::-1])
    assert len(passes) == 3
    videos[1].mul_(0.5)  # the same tensor with other frames
    after = reward.score(videos, PROMPTS).scores
    assert after[0] == pytest.approx(before[0].item(), abs=1e-5) and abs(after[1] - before[1]) > 1e-3
    assert reward.score(videos[:1], PROMPTS[:1]).scores.shape == (1,)
    assert len(passes) == 5


def test_a_model_that_nobody_uses_is_gone(make):
    reward = make(TA, batch_size=7)
    assert reward.video_reward in _MODELS.values()
    model = weakref.ref(reward.model)
    del reward
    gc.collect()
    assert model() is None


def test_scores_may_enter_a_loss(make):
    output = make(OVERALL).score(patterns(), PROMPTS)
    weight = torch.ones(2, requires_grad=True)
    for values in (output.scores, *output.info.values()):
        assert not values.requires_grad
        (weight * values).sum().backward()


def test_special_tokens_in_a_prompt(make):
    scores = make(TA).score(patterns(), ["<|VQ_reward|> a <|TA_reward|>", "<|video_pad|>"]).scores
    assert scores.isfinite().all()


@pytest.mark.parametrize("frames, expected", [(1, 1), (3, 2), (12, 4)])
def test_short_videos(make, frames, expected):
    reward = make(OVERALL)
    assert reward.requested(patterns(frames=frames)).shape[1] == expected
    assert reward.score(patterns(frames=frames), PROMPTS).scores.isfinite().all()


def copy_around(published, folder):
    for name in ("model_config.json", "prompt_template.py"):
        shutil.copy(published.folder / name, folder)
    (folder / "checkpoint-3").mkdir()
    return folder / "checkpoint-3"


def layout_weight_file(published, folder):
    return published.folder / "checkpoint-11" / "model.pth"


def layout_checkpoint_folder(published, folder):
    return published.folder / "checkpoint-11"


def layout_new_names(published, folder):
    """As PEFT and transformers 5 name them; the tokenizer is that of the base, with the tokens added."""
    weights = published.wrapped.state_dict()
    weights |= {f"base_model.model.rm_head.{name}": tensor for name, tensor in published.head.state_dict().items()}
    torch.save(weights, copy_around(published, folder) / "model.pth")
    return folder


def layout_merged_and_sharded(published, folder):
    checkpoint = copy_around(published, folder)
    merged = copy.deepcopy(published.wrapped).merge_and_unload().state_dict()
    weights = {published_checkpoints.old_name(name): tensor for name, tensor in merged.items()}
    weights |= {f"rm_head.{name}": tensor for name, tensor in published.head.state_dict().items()}
    halves = [dict(list(weights.items())[start::2]) for start in (0, 1)]
    for i, half in enumerate(halves):
        save_file(half, checkpoint / f"{i}.safetensors")
    weight_map = {name: f"{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def layout_adapter(published, folder):
    """The LoRA and what else was trained in two files, beside the base model with its unused rows."""
    checkpoint = copy_around(published, folder)
    trained = ("visual.", "embed_tokens", "rm_head")
    lora = {n.replace(".default", ""): t for n, t in published.weights.items() if "lora_" in n}
    rest = {n: t for n, t in published.weights.items() if any(part in n for part in trained)}
    save_file(lora, checkpoint / "adapter_model.safetensors")
    torch.save(rest, checkpoint / "non_lora_state_dict.pth")
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in published.weights.items()
        if "lora_" not in name and "rm_head" not in name
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = torch.zeros(len(published.tokens) + 17, 64)
    save_file(base, published.base / "model.safetensors")
    return folder


LAYOUTS = [
    layout_weight_file, layout_checkpoint_folder, layout_new_names, layout_merged_and_sharded, layout_adapter
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_scores(published, make, layout, tmp_path):
    reward = make(OVERALL, layout(published, tmp_path))
    expected = make(OVERALL)
    assert reward.model is not expected.model
    scores = reward.score(patterns(), PROMPTS).scores
    torch.testing.assert_close(scores, expected.score(patterns(), PROMPTS).scores, atol=2e-6, rtol=0)


def test_a_head_with_an_output_for_each_token(tmp_path):
    published = published_checkpoints.videoreward(tmp_path, outputs=3)
    reward = VideoAlign(str(published.folder), str(published.base), device="cpu")
    output = reward.score(patterns(), PROMPTS)
    prompt = reward.video_reward.prompt
    texts = [prompt.ids(text, "<|TA_reward|>") for text in PROMPTS]
    logits = reward.model(reward.requested(patterns()), texts, prompt.token_ids)
    raw = torch.stack([logits[:, 0, 0], logits[:, 1, 1], logits[:, 2, 2]], 1)
    torch.testing.assert_close(torch.stack(list(output.info.values()), 1), normalised(raw), atol=1e-5, rtol=0)


def fault_missing(weights):
    del weights["base_model.model.visual.merger.mlp.0.weight"]
    return r"1 missing \(backbone.visual.merger.mlp.0.weight\)"


def fault_half_a_lora(weights):
    del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    return "only a part of backbone.language_model.layers.0.self_attn.q_proj.weight and its two LoRA matrices"


def fault_renamed_as_in_a_known_port(weights):
    """`base_model.model.model.` is taken for `base_model.model.`: not one layer would be loaded."""
    for name in [name for name in weights if name.startswith("base_model.model.model.")]:
        weights[name.replace("base_model.model.model.", "base_model.model.")] = weights.pop(name)
    return "only a part of .*layers.0.* and its two LoRA matrices|missing.*unexpected"


FAULTS = [fault_missing, fault_half_a_lora, fault_renamed_as_in_a_known_port]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_weights_that_do_not_fit(published, make, fault, tmp_path):
    weights = dict(published.weights)
    message = fault(weights)
    torch.save(weights, copy_around(published, tmp_path) / "model.pth")
    with pytest.raises(ValueError, match=message) as caught:
        make(TA, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_file(published, make, tmp_path):
    whole = (published.folder / "checkpoint-11" / "model.pth").read_bytes()
    (copy_around(published, tmp_path) / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.pth is no readable checkpoint"):
        make(TA, tmp_path)


def test_files_that_are_missing(published, make, tmp_path):
    with pytest.raises(ValueError, match="is no VideoReward: there is no model_config.json in it or above it"):
        make(TA, tmp_path)
    copy_around(published, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-3 holds no weights: there is no model.pth"):
        make(TA, tmp_path)
    (tmp_path / "prompt_template.py").unlink()
    with pytest.raises(ValueError, match="the text it was trained with, and .*prompt_template.py does not exist"):
        make(TA, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu(make):
    videos = patterns(frames=12)
    for reward in (MQ, OVERALL):
        expected = make(reward).score(videos, PROMPTS).scores
        exact = make(reward, device="cuda", dtype="float32").score(videos.cuda(), PROMPTS).scores
        torch.testing.assert_close(exact, expected, atol=5e-3, rtol=0)
        # In bfloat16: random weights of this size differ by 0.13 at the most, of scores about 1.
        rounded = make(reward, device=None).score(videos, PROMPTS).scores
        torch.testing.assert_close(rounded, expected, atol=0.2, rtol=0)


def test_lora_is_scaled_as_peft_scales_it(published):
    """The layers that the tests above load would otherwise be the same with any alpha."""
    assert (
        published.wrapped.peft_config["default"].lora_alpha / published.wrapped.peft_config["default"].r == ALPHA / 4
    )
