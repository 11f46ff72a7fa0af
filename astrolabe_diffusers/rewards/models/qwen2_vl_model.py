"""A Qwen2-VL with a reward head: its inputs, without its processor (which needs torchvision), and its weights."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from .model_reward import fill, normalize, read_weights


# What is used of the base model beside its weights.
BASE_FILES = ["config.json", "*token*", "vocab.json", "merges.txt"]

# Of every Qwen2-VL: pixels a side of a patch, patches a side of a token, frames a token.
PATCH, MERGE, FRAMES = 14, 2, 2
CELL = PATCH * MERGE

# Qwen2's chat format up to the text of the user, whose message begins with the picture.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>"
)
_SLOT = "{text_prompt}"

# Beginnings of names of transformers 4 (`model.layers`, `visual`) and of 5, and those of the modules here; the first
# that fits.
_RENAMES = {
    "rm_head.": "head.",
    "visual.": "backbone.visual.",
    "model.visual.": "backbone.visual.",
    "language_model.": "backbone.language_model.",
    "model.language_model.": "backbone.language_model.",
    "model.": "backbone.language_model.",
}
_LORA = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")

EMBEDDING = "backbone.language_model.embed_tokens.weight"
_SIZES = {1536: "Qwen2-VL-2B", 3584: "Qwen2-VL-7B", 8192: "Qwen2-VL-72B"}


def resized_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) that frames are resized to: whole cells of 28 pixels, near the shape they have, with
    their area between the two bounds as far as whole cells allow (Qwen2-VL's `smart_resize`)."""
    rows, columns = (max(1, round(side / CELL)) for side in (height, width))
    area = rows * columns * CELL**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / CELL)) for side in (height, width))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / CELL) for side in (height, width))
    return rows * CELL, columns * CELL


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches, float32 [N * t * h/14 * w/14, 1176], and the grid [N, 3] of each (t, h/14, w/14), of uint8
    frames [N, T, 3, h, w] of a size that `resized_size` gave; the last is repeated if T is odd."""
    if frames.shape[1] % FRAMES:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    number, length, channels, height, width = frames.shape
    grid = (length // FRAMES, height // PATCH, width // PATCH)
    x = normalize(frames).view(
        number, grid[0], FRAMES, channels, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH
    )
    # The four patches of a token lie together; within a patch: channel, frame, row, column.
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(-1, channels * FRAMES * PATCH**2), torch.tensor([grid] * number, device=frames.device)


class RewardPrompt:
    """
    The text that a reward model was trained with, as token ids.

    Args:
        tokenizer: of the model; the reward tokens are added to it if they are not there.
        template: the published text, with `{text_prompt}` where the prompt goes and each reward token once.
        tokens: the reward tokens in their order in the text.
        pad: the token in whose place the picture goes, `<|image_pad|>` or `<|video_pad|>`.
    """

    def __init__(self, tokenizer, template: str, tokens: tuple[str, ...], pad: str):
        for piece in (_SLOT, *tokens):
            if template.count(piece) != 1:
                raise ValueError(f"the template must hold {piece} once, and holds it {template.count(piece)} times.")
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.tokenizer, self.template, self.tokens, self.pad = tokenizer, template, tokens, pad
        self.token_ids = tokenizer.convert_tokens_to_ids(list(tokens))

    def ids(self, prompt: str, last: str) -> torch.Tensor:
        """Token ids [L] up to the reward token `last`: as attention is causal, what follows does not count. A prompt
        that holds a special token is only text: `<|` becomes `< |`."""
        text = self.template.split(last)[0].replace(_SLOT, prompt.replace("<|", "< |"))
        ids = self.tokenizer(_CHAT.format(self.pad) + text + last, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)


class Qwen2VLRewardModel(nn.Module):
    """
    Scores at the reward tokens of a text that follows a picture or a video.

    As the published models were trained (transformers 4.45): positions count tokens, without the three axes of
    Qwen2-VL, and all rotary angles are those of frequencies rounded to bfloat16. The head works in float32.
    """

    def __init__(self, config, head: nn.Module):
        super().__init__()
        from transformers import Qwen2VLModel

        self.backbone = Qwen2VLModel(config)
        self.head = head
        rotary = self.backbone.language_model.rotary_emb
        rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
        self.backbone.visual.rotary_pos_emb = _RoundedVisionRotary(self.backbone.visual.rotary_pos_emb.inv_freq)

    def compile_layers(self):
        """Those of the language model, one graph for all, when they are first called; those of the vision model hold
        lengths that only the host knows."""
        for layer in self.backbone.language_model.layers:
            layer.compile()

    def forward(self, frames: torch.Tensor, texts: list[torch.Tensor], token_ids: list[int]) -> torch.Tensor:
        """
        float32 [N, K, outputs of the head].

        Args:
            frames: uint8 [N, T, 3, h, w].
            texts: N rows of token ids as [`RewardPrompt`] makes them, with one pad for the picture.
            token_ids: of the K reward tokens; each is in every row once.
        """
        patches, grid = patchify(frames)
        pad = self.backbone.config.video_token_id
        kind = {"pixel_values_videos": patches, "video_grid_thw": grid}
        if not (texts[0] == pad).any():
            pad = self.backbone.config.image_token_id
            kind = {"pixel_values": patches, "image_grid_thw": grid}
        tokens = int(grid[0].prod()) // MERGE**2
        rows = [text.repeat_interleave(torch.where(text == pad, tokens, 1)) for text in texts]
        # Padding is on the right and attention causal: nothing that counts sees it, so there is no mask.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(frames.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
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


def read_reward_weights(files: list[Path], lora_alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Published tensors under the names of [`Qwen2VLRewardModel`], with `lora_alpha` of one with LoRA matrices merged;
    `lm_head`, which is not used, is left out."""
    renamed = {}
    for name, tensor in read_weights(files).items():
        short = name.removeprefix("base_model.model.")  # PEFT's
        if short.startswith("lm_head."):
            continue
        old = next((old for old in _RENAMES if short.startswith(old)), None)
        name = _RENAMES[old] + short.removeprefix(old) if old else name
        renamed[name.replace(".base_layer.", ".")] = tensor
    return renamed if lora_alpha is None else _merge_lora(renamed, lora_alpha)


def _merge_lora(weights: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """W + alpha / rank * B A, in float32, for each pair of LoRA matrices among tensors named as in the module."""
    merged: dict[str, torch.Tensor] = {}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if match := _LORA.search(name):
            pairs.setdefault(name[: match.start()] + ".weight", {})[match[1]] = tensor
        else:
            merged[name] = tensor
    for name, pair in pairs.items():
        if len(pair) != 2 or name not in merged:
            raise ValueError(f"this checkpoint does not fit: it has only a part of {name} and its two LoRA matrices.")
        delta = pair["B"].float() @ pair["A"].float()
        merged[name] = merged[name].float() + alpha / len(pair["A"]) * delta
    return merged


def load_reward_model(
    weights: dict[str, torch.Tensor],
    base: str,
    folder: Path,
    head: Callable[[int], nn.Module],
    prompt: RewardPrompt,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool = False,
) -> Qwen2VLRewardModel:
    """
    The model with `weights` (named as in the module), the head in float32 and all else in `dtype`. A `ValueError` if a
    tensor is missing, unexpected or of another shape, or the tokenizer is that of another model.

    Args:
        base, folder: what the user calls the base model, and where its configuration is; the vocabulary is that of
            the weights.
        head: makes the head for hidden states of that width.
        compile: the layers of the language model, by torch.compile, when they are first called.
    """
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig.from_pretrained(folder)
    rows, width = weights[EMBEDDING].shape if EMBEDDING in weights else (config.text_config.vocab_size, 0)
    config.text_config.vocab_size = rows
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLRewardModel(config, head(config.text_config.hidden_size))
    looks = f" These are weights of a {_SIZES[width]}." if width in _SIZES else ""
    fill(model, weights, f"this checkpoint does not fit {base}", looks)
    if len(prompt.tokenizer) != rows:
        raise ValueError(
            f"the tokenizer of {base} has {len(prompt.tokenizer)} tokens with {', '.join(prompt.tokens)}, "
            f"and the checkpoint {rows}: one of them is of another model."
        )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.startswith("head.") else dtype)
    if compile:
        model.compile_layers()
    return model.to(device).eval().requires_grad_(False)
