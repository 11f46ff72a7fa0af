"""VideoAlign's VideoReward: visual quality, motion quality and text alignment of a video."""

import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import nn

from ...layouts.tensor_files import find_weights
from ..frames import FrameRequest
from ..registry import register_reward
from ..reward import RewardOutput
from .model_reward import ModelReward, fetch, read_template
from .qwen2_vl_model import BASE_FILES, EMBEDDING, RewardPrompt, load_reward_model, read_reward_weights, resized_size


DIMENSIONS = ("VQ", "MQ", "TA")
_TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
_PIXELS = (128 * 28 * 28, 256 * 28 * 28)
_WEIGHTS = ("model.pth", "model.safetensors", "pytorch_model.bin")
_ADAPTER, _REST = "adapter_model.safetensors", "non_lora_state_dict.pth"
_TEMPLATE_FILE, _TEMPLATE_NAMES = "prompt_template.py", ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)


class VideoReward:
    """
    The model behind all VideoAlign rewards: one for all that have the same settings, and one pass in colour and one in
    gray for a batch, whichever of them ask. See [`VideoAlign`] for the arguments.
    """

    def __init__(self, checkpoint, base, template, batch_size, device, dtype, compile):
        from transformers import AutoTokenizer

        self.batch_size = batch_size
        root, folder, file = _locate(fetch(checkpoint, ["*.json", "*.py", "checkpoint-*/*"]))
        settings = json.loads((root / "model_config.json").read_text(encoding="utf-8"))
        norms = settings["inference_config"]
        self.mean = torch.tensor([float(norms[f"{name}_mean"]) for name in DIMENSIONS])
        self.std = torch.tensor([float(norms[f"{name}_std"]) for name in DIMENSIONS])
        remedy = f"put the {_TEMPLATE_FILE} of VideoAlign's repository there, or set template to it."
        text_file = Path(template) if template else root / _TEMPLATE_FILE
        text = read_template("VideoReward", [text_file], _TEMPLATE_NAMES, remedy)

        adapter = file is None and (folder / _ADAPTER).is_file()
        base_folder = fetch(base, BASE_FILES + ["*.safetensors", "*.index.json"] * adapter)
        own = folder / "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(own if own.is_dir() else base_folder)
        self.prompt = RewardPrompt(tokenizer, text, _TOKENS, "<|video_pad|>")

        if adapter:
            files = [*find_weights(base_folder, ("model.safetensors",)), folder / _REST, folder / _ADAPTER]
        else:
            files = find_weights(file or folder, _WEIGHTS)
        weights = read_reward_weights(files, settings["peft_lora_config"]["lora_alpha"])
        if adapter:
            # The base has unused rows.
            weights[EMBEDDING] = weights[EMBEDDING][: len(tokenizer)]
        # The released head has one output for all three tokens; one trained with three has its own for each.
        outputs = len(weights["head.weight"]) if "head.weight" in weights else 1
        self.model = load_reward_model(
            weights,
            base,
            base_folder,
            lambda width: nn.Linear(width, outputs, bias=False),
            self.prompt,
            device,
            dtype,
            compile,
        )
        self._passes: dict[bool, tuple] = {}

    def scores(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """float32 [B, 3] of VQ, MQ and TA, each less its mean and over its deviation, of uint8 frames [B, F, 3, h, w]
        as `VideoAlign` requests them; or [B, 2], without TA, of gray ones [B, F, 1, h, w], for which the text is read
        up to MQ and holds no prompt."""
        gray = frames.shape[2] == 1
        # What the last batch was is compared, not its identity: nobody can change it unseen.
        last_frames, last_prompts, known = self._passes.get(gray, (frames.new_empty(0), [], None))
        same = last_frames.device == frames.device and torch.equal(last_frames, frames)
        if same and (gray or last_prompts == prompts):
            return known.clone()
        tokens = _TOKENS[:2] if gray else _TOKENS
        ids, size = self.prompt.token_ids[: len(tokens)], self.batch_size
        with torch.inference_mode():
            pixels = frames.expand(-1, -1, 3, -1, -1)
            texts = [self.prompt.ids(prompt, tokens[-1]) for prompt in prompts]
            parts = range(0, len(texts), size)
            logits = torch.cat([self.model(pixels[i : i + size], texts[i : i + size], ids) for i in parts])
            raw = logits[..., 0] if logits.shape[2] == 1 else logits.diagonal(dim1=1, dim2=2)
        scores = (raw.cpu() - self.mean[: len(tokens)]) / self.std[: len(tokens)]
        self._passes[gray] = (frames.clone(), list(prompts), scores)
        return scores.clone()


_MODELS: WeakValueDictionary[tuple, VideoReward] = WeakValueDictionary()


@register_reward("videoalign_vq_score", dimensions=("VQ",))
@register_reward("videoalign_mq_score", dimensions=("MQ",), gray=True)
@register_reward("videoalign_mq_rgb_score", dimensions=("MQ",))
@register_reward("videoalign_ta_score", dimensions=("TA",))
@register_reward("videoalign_score")
@dataclass(eq=False)
class VideoAlign(ModelReward):
    """
    Scores of VideoReward; `info` has those that the same pass gives. Registered are

    - `videoalign_vq_score`, visual quality: how clear, detailed and plausible the pictures are;
    - `videoalign_mq_score`, motion quality without the colours (Astrolabe's choice), and `videoalign_mq_rgb_score`,
      with them, as VideoReward itself has it: how stable, natural and ample the motion is;
    - `videoalign_ta_score`, text alignment: subject, motion, place, style and camera against the prompt;
    - `videoalign_score`, the mean of visual quality, motion quality (in colour) and text alignment.

    - Range: deviations from the mean of its training data, about -3 to 3.
    - Frames: two a second of the video, 10 of 81 at 16 fps (`frames="fps:2"`), spread evenly, in at most 448 x 448
      pixels of their own shape.
    - Cost: a 2B model (4.4 GB in bfloat16), some 2,200 tokens for 10 frames; one pass for all scores in colour, and
      one of some 1,900 for the one in gray. All rewards with the same options share one model.
    - Weights: `KlingTeam/VideoReward` on the Hub, on Qwen2-VL-2B-Instruct (both Apache-2.0). Paper: arXiv 2501.13918.

    Args:
        checkpoint: Hub id, folder with `model_config.json` and `checkpoint-N`, of which the highest N is taken, one of
            these, or the weight file in it.
        base: Hub id or folder of the base model.
        template: the text that the model was trained to read, the file `prompt_template.py` of the repository
            KlingAIResearch/VideoAlign, by default beside `model_config.json`; it is read and never run.
        dimensions: those of "VQ", "MQ" and "TA" whose mean is the score. Without "TA" the prompt does not count.
        gray: without the colours, which go before the frames are resized, as published; not with "TA".
        compile: as of [`HPSv3`].
        frames, fps, batch_size, device, dtype: see [`ModelReward`]; a batch is of videos.
    """

    checkpoint: str = "KlingTeam/VideoReward"
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    template: str | None = None
    _: KW_ONLY
    dimensions: Sequence[str] = DIMENSIONS
    gray: bool = False
    compile: bool = False
    frames: str = "fps:2"
    batch_size: int = 4

    def __post_init__(self):
        super().__post_init__()
        known = DIMENSIONS[:2] if self.gray else DIMENSIONS
        if not self.dimensions or not set(self.dimensions) <= set(known):
            raise ValueError(
                f"dimensions of VideoAlign{' in gray' * self.gray} are of {', '.join(known)}, not {self.dimensions!r}."
            )
        self.uses_prompt = "TA" in self.dimensions
        settings = (self.checkpoint, self.base, self.template, self.batch_size, self.device, self.dtype, self.compile)
        self.video_reward = _MODELS.get(settings)
        if self.video_reward is None:
            self.video_reward = _MODELS[settings] = VideoReward(*settings)
        self.model = self.video_reward.model

    def request(self, num_frames, height, width):
        size = resized_size(height, width, *_PIXELS)
        return FrameRequest(tuple(self.select(num_frames)), (size,), self.gray)

    def score(self, videos, prompts, metadata=None):
        frames = self.requested(videos).to(self.current_device)
        if frames.shape[2] != (1 if self.gray else 3):
            raise ValueError(f"VideoAlign{' in gray' * self.gray} was given frames of {frames.shape[2]} channels.")
        parts = dict(zip(DIMENSIONS, self.video_reward.scores(frames, prompts).unbind(1)))
        score = sum(parts[name] for name in self.dimensions) / len(self.dimensions)
        if not self.uses_prompt:
            parts.pop("TA", None)  # it is said to depend on the video alone
        return RewardOutput(score, parts)


def _locate(path: Path) -> tuple[Path, Path, Path | None]:
    """The folder with `model_config.json`, that of the checkpoint, and the weight file if `path` is one."""
    file = path if path.is_file() else None
    folder = path.parent if file else path
    steps = [step for step in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", step.name)]
    if steps and not file:
        folder = max(steps, key=lambda step: int(step.name.rpartition("-")[2]))
    for root in (folder, folder.parent):
        if (root / "model_config.json").is_file():
            return root, folder, file
    raise ValueError(f"{path} is no VideoReward: there is no model_config.json in it or above it.")
