"""Frames and prompts as Qwen2-VL takes them, without its processor (which needs torchvision)."""

from __future__ import annotations

import math

import torch

from .model_reward import normalize


# Of every Qwen2-VL: pixels a side of a patch, patches a side of a token, frames a token.
PATCH, MERGE, FRAMES = 14, 2, 2
CELL = PATCH * MERGE

# Qwen2's chat format up to the text of the user, whose message begins with the picture.
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER = "<|vision_end|>"
_SLOT = "{text_prompt}"


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
    """
    Args:
        frames: uint8 [N, T, 3, h, w] of a size that `resized_size` gave; the last is repeated if T is odd.

    Returns:
        normalised patches, float32 [N * t * h/14 * w/14, 1176], and the grid [N, 3] of each (t, h/14, w/14).
    """
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
        self.pad_id = tokenizer.convert_tokens_to_ids(pad)

    def ids(self, prompt: str, last: str) -> torch.Tensor:
        """Token ids [L] up to the reward token `last`: as attention is causal, what follows does not count.

        A prompt that holds a special token is only text: `<|` becomes `< |`.
        """
        text = self.template.split(last)[0].replace(_SLOT, prompt.replace("<|", "< |"))
        ids = self.tokenizer(_BEFORE + self.pad + _AFTER + text + last, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)
