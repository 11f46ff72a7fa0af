"""A Qwen2-VL with a reward head, from published weights."""

from __future__ import annotations

import re

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from ...layouts.tensor_files import misfits
from .qwen2_vl_inputs import MERGE, RewardPrompt, patchify


# Names of transformers 4 (`model.layers`, `visual`) and of 5, with PEFT's prefix and without, to those of the modules
# here. The language model's output layer is not used.
_RENAMES = (
    (re.compile(r"^(?:base_model\.model\.)?rm_head\."), "head."),
    (re.compile(r"^(?:base_model\.model\.)?(?:model\.)?visual\."), "backbone.visual."),
    (re.compile(r"^(?:base_model\.model\.)?(?:model\.)?language_model\."), "backbone.language_model."),
    (re.compile(r"^(?:base_model\.model\.)?model\."), "backbone.language_model."),
)
_UNUSED = re.compile(r"^(?:base_model\.model\.)?lm_head\.")
_LORA = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")

EMBEDDING = "backbone.language_model.embed_tokens.weight"
_SIZES = {1536: "Qwen2-VL-2B", 3584: "Qwen2-VL-7B", 8192: "Qwen2-VL-72B"}


class Qwen2VLRewardModel(nn.Module):
    """
    Scores at the reward tokens of a text that follows a picture or a video.

    As the published models were trained (transformers 4.45): positions count tokens, without the three axes of
    Qwen2-VL, and all rotary angles are those of frequencies rounded to bfloat16. The head works in float32.
    """

    def __init__(self, config: Qwen2VLConfig, head: nn.Module):
        super().__init__()
        self.backbone = Qwen2VLModel(config)
        self.head = head
        rotary = self.backbone.language_model.rotary_emb
        rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
        self.backbone.visual.rotary_pos_emb = _RoundedVisionRotary(self.backbone.visual.rotary_pos_emb.inv_freq)

    def forward(self, frames: torch.Tensor, texts: list[torch.Tensor], token_ids: list[int]) -> torch.Tensor:
        """
        Args:
            frames: uint8 [N, T, 3, h, w].
            texts: N rows of token ids as [`RewardPrompt`] makes them, with one pad for the picture.
            token_ids: of the K reward tokens; each is in every row once.

        Returns:
            float32 [N, K, outputs of the head].
        """
        patches, grid = patchify(frames)
        image, video = self.backbone.config.image_token_id, self.backbone.config.video_token_id
        tokens = int(grid[0].prod()) // MERGE**2
        rows = [_with_pads(text.to(frames.device), (image, video), tokens) for text in texts]
        # Padding is on the right and attention causal: nothing that counts sees it, so there is no mask.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        kind = {"pixel_values": patches, "image_grid_thw": grid}
        if (ids[0] == video).any():
            kind = {"pixel_values_videos": patches, "video_grid_thw": grid}
        hidden = self.backbone(input_ids=ids, position_ids=positions, use_cache=False, **kind).last_hidden_state
        places = (ids[:, None] == torch.tensor(token_ids, device=ids.device)[:, None]).int().argmax(2)
        return self.head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])).float())


class _RoundedVisionRotary(nn.Module):
    """Qwen2-VL's vision rotary embedding as transformers 4 has it in a model that was cast to bfloat16: frequencies,
    angles, sines and cosines are all rounded."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.clone(), persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Row and column of each patch [patches, 2] -> [patches, 2, frequencies] -> [patches, head dim]
        angles = (position_ids[..., None].bfloat16() * self.inv_freq.bfloat16()).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()


def _with_pads(ids: torch.Tensor, pads: tuple[int, int], count: int) -> torch.Tensor:
    is_pad = (ids == pads[0]) | (ids == pads[1])
    return ids.repeat_interleave(torch.where(is_pad, count, 1))


def module_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors under the names of [`Qwen2VLRewardModel`], LoRA matrices included; `lm_head` is left out."""
    renamed = {}
    for name, tensor in weights.items():
        if _UNUSED.match(name):
            continue
        for pattern, replacement in _RENAMES:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        renamed[name.replace(".base_layer.", ".")] = tensor
    return renamed


def merge_lora(weights: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """W + alpha / rank * B A, in float32, for each pair of LoRA matrices among tensors named as in the module."""
    merged = {name: tensor for name, tensor in weights.items() if not _LORA.search(name)}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if match := _LORA.search(name):
            pairs.setdefault(name[: match.start()] + ".weight", {})[match[1]] = tensor
    for name, pair in pairs.items():
        if len(pair) != 2 or name not in merged:
            raise ValueError(f"this checkpoint does not fit: it has only a part of {name} and its two LoRA matrices.")
        delta = pair["B"].float() @ pair["A"].float()
        merged[name] = merged[name].float() + alpha / len(pair["A"]) * delta
    return merged


def load_reward_model(
    weights: dict[str, torch.Tensor],
    base: str,
    config: Qwen2VLConfig,
    head: nn.Module,
    prompt: RewardPrompt,
    device: torch.device,
    dtype: torch.dtype,
) -> Qwen2VLRewardModel:
    """
    The model with `weights` (named as in the module), the head in float32 and all else in `dtype`.

    Args:
        base: of `config`, for messages.
        config: of the base model; the vocabulary is that of the weights.
        head: on the meta device.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape, or the tokenizer is that of another model.
    """
    rows = weights[EMBEDDING].shape[0] if EMBEDDING in weights else config.text_config.vocab_size
    config.text_config.vocab_size = rows
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLRewardModel(config, head)
    if found := misfits(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}):
        width = weights[EMBEDDING].shape[1] if EMBEDDING in weights else 0
        looks = f" These are weights of a {_SIZES[width]}." if width in _SIZES else ""
        raise ValueError(f"this checkpoint does not fit {base}: {found}.{looks}")
    if len(prompt.tokenizer) != rows:
        raise ValueError(
            f"the tokenizer of {base} has {len(prompt.tokenizer)} tokens with {', '.join(prompt.tokens)}, "
            f"and the checkpoint {rows}: one of them is of another model."
        )
    cast = {name: tensor.to(torch.float32 if name.startswith("head.") else dtype) for name, tensor in weights.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)
