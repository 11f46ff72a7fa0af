"""HPSv3, a preference model for pictures, on the frames of a video."""

import importlib.util
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from torch import nn

from ...layouts.tensor_files import find_weights
from ..registry import register_reward
from .model_reward import FrameReward, fetch, read_template
from .qwen2_vl_model import BASE_FILES, RewardPrompt, load_reward_model, read_reward_weights, resized_size


_TOKEN = "<|Reward|>"
_PIXELS = 256 * 28 * 28
_WEIGHTS = ("HPSv3.safetensors", "model.safetensors", "HPSv3.pth")
_TEMPLATE_FILE, _TEMPLATE_NAMES = "data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")


@register_reward("video_hpsv3_local")
@dataclass(eq=False)
class HPSv3(FrameReward):
    """
    How much people would like the frames as pictures, and how well they fit the prompt.

    - Range: unbounded, about -2 for noise to 12; the mean of the predicted preference, its deviation is not used.
    - Frames: every one, and the mean of the best 30 %, as published; `frames="stride:4"` costs a quarter. Each is
      resized to about 448 x 448 pixels of its own shape.
    - Cost: a 7B model (16 GB in bfloat16) on some 850 tokens a frame.
    - Weights: `MizzenAI/HPSv3` on the Hub (MIT), on Qwen2-VL-7B-Instruct (Apache-2.0), whose configuration and
      tokenizer are used. Paper: arXiv 2508.03789.

    Args:
        checkpoint: Hub id, folder (sharded too) or file of the weights.
        base: Hub id or folder of the base model.
        template: the text that the model was trained to read, published as code: a `data_collator_qwen.py`, by default
            in the folder of the weights or of the package (`pip install --no-deps hpsv3`); it is read and never run.
        compile: the layers of the language model by torch.compile, which takes its time at the first clip; scores
            differ by rounding.
        frames, fps, top_fraction, batch_size, device, dtype: see [`FrameReward`].
    """

    checkpoint: str = "MizzenAI/HPSv3"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    template: str | None = None
    _: KW_ONLY
    compile: bool = False
    top_fraction: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        from transformers import AutoTokenizer

        path = fetch(self.checkpoint, ["*.safetensors", "*.json", "*.py"])
        folders = [path if path.is_dir() else path.parent]
        if package := importlib.util.find_spec("hpsv3"):
            folders += [Path(folder) / "dataset" for folder in package.submodule_search_locations]
        files = [Path(self.template)] if self.template else [folder / _TEMPLATE_FILE for folder in folders]
        remedy = f"pip install --no-deps hpsv3, or set template to the {_TEMPLATE_FILE} of HPSv3's repository."
        text = read_template("HPSv3", files, _TEMPLATE_NAMES, remedy)
        base = fetch(self.base, BASE_FILES)
        self.prompt = RewardPrompt(AutoTokenizer.from_pretrained(base), text, (_TOKEN,), "<|image_pad|>")
        weights = read_reward_weights(find_weights(path, _WEIGHTS))
        self.model = load_reward_model(
            weights, self.base, base, _head, self.prompt, self.device, self.dtype, self.compile
        )

    def frame_size(self, height, width):
        return resized_size(height, width, _PIXELS, _PIXELS)

    def encode_prompts(self, prompts):
        return [self.prompt.ids(prompt, _TOKEN) for prompt in prompts]

    def score_frames(self, frames, texts):
        return self.model(frames[:, None], texts, self.prompt.token_ids)[:, 0, 0]


def _head(width: int) -> nn.Module:
    """From the state of the reward token to mean and deviation."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
