"""The model of a server's sessions: what it can make, and what it takes from viewers."""

import math
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from ..errors import close_matches
from ..models.lora_layers import dora_adapters
from ..pipelines.loading import base_digest, frame_configs, lora_digest
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..pipelines.scene_prompt import parse_scenes
from ..pipelines.stream import PromptSwitch
from ..shareable import shareable_value
from .start_file import StartFile, available_media


# JavaScript's whole numbers end there.
MAX_SEED = 2**53 - 1
MAX_PROMPT = 4096
# Texts are in memory from the time at which they are asked for.
MAX_SCENES = MAX_TRANSITION_BLOCKS = 32
MAX_WEIGHT = 100
# What changes frames beside the weights, and what it is if nobody says so. Sessions have it.
FRAME_SETTINGS = {"max_sequence_length": None, "vae_tiling": False, "attention_backend": None, "compile": False}


class LiveModel:
    """
    A pipeline on its device, and what its sessions have to know of it.

    Args:
        pipe: with its LoRAs loaded by [`load_loras`].
        name: of the model, as it is shown and stored.
        loras: paths or Hub ids and their weights, in the order in which they were loaded.
        num_frames: after which a video ends. By default never, or with the model's own number if it cannot go on.
        max_pixels: of a frame; by default as many as the model's own size has.
        max_sequence_length: of its prompts, in tokens; the pipeline's own by default.
        settings: further ones that `pipe` was made with and that change frames, by their names in [`PipelineConfig`].
    """

    def __init__(
        self,
        pipe: CausalWanPipeline,
        name: str,
        loras: Mapping[str, float] | None = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
        max_sequence_length: int | None = None,
        **settings: Any,
    ):
        self.pipe = pipe
        self.name = name
        self.weights = shareable_value(dict(loras or {}))
        self.adapters = {lora: f"lora_{i}" for i, lora in enumerate(self.weights)}
        # Layers add them up one after the other. By their names, or a session would not come again with a model to
        # which they were given in another order.
        if names := sorted(self.weights):
            pipe.set_adapters([self.adapters[lora] for lora in names], [self.weights[lora] for lora in names])
        # Now, for it looks at every layer: viewers send thousands of weights.
        doras = dora_adapters(pipe.denoiser)
        self.doras = {lora for lora, name in self.adapters.items() if name in doras}
        self.num_frames = num_frames or (math.inf if pipe.is_endless else pipe.config.num_frames)
        self.num_frames = pipe.round_num_frames(self.num_frames)
        pipe.check_inputs("", pipe.config.height, pipe.config.width, self.num_frames)
        self.max_pixels = max_pixels or pipe.config.height * pipe.config.width
        length = max_sequence_length or pipe.config.max_sequence_length
        self.stream_settings = {"max_sequence_length": length}
        self.settings = FRAME_SETTINGS | settings | self.stream_settings
        self.digest = base_digest(pipe)
        self.configs = frame_configs(pipe)
        # Not where the weights are, which may be offloaded. Once: diffusers goes through all modules for it.
        self._device = pipe._execution_device
        self.block_seconds = 0.0  # of one in the model's own size, if it is warm
        self.lora_digests = {lora: lora_digest(pipe.denoiser, name) for lora, name in self.adapters.items()}

    @property
    def frames_first_block(self) -> int:
        return self.pipe.frames_of_blocks(1)

    @property
    def frames_per_block(self) -> int:
        return self.pipe.frames_of_blocks(2) - self.pipe.frames_of_blocks(1)

    @property
    def frame_rate(self) -> int:
        return self.pipe.config.frame_rate

    @property
    def start_media(self) -> list[str]:
        """Media types of the files that a video may start from; pictures if a block has one latent frame."""
        return available_media(pictures=self.frames_first_block == 1)

    def read_start(self, data: bytes) -> StartFile:
        """A file that videos may start from; a `ValueError` if this model cannot."""
        file = StartFile.read(data)
        self.num_start_frames(file)
        return file

    def num_start_frames(self, file: StartFile, strength: float | None = None) -> int:
        """
        So many of its first frames a video starts from: whole blocks of them.

        Raises:
            ValueError: there is no whole block, or it is a picture and a block has more latent frames than one.
        """
        first, step = self.frames_first_block, self.frames_per_block
        if file.is_picture and first > 1:
            raise ValueError(
                f"a picture is one frame, but the first block of this model has {first}: give a video of {first} "
                "frames or more."
            )
        # Without a strength there has to be a block to make.
        room = min(file.num_frames, self.num_frames - (step if strength is None else 0))
        if room < first:
            raise ValueError(
                f"the first block of this model has {first} frames, and of the file's {file.num_frames} only "
                f"{max(room, 0)} can be given."
            )
        return int(first + (room - first) // step * step)

    def memory_gb(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / 1e9
        return psutil.Process().memory_info().rss / 1e9

    def check_event(self, event: Any) -> dict[str, Any]:
        """A prompt or a change of LoRAs with all that it may say; a `ValueError` if it is none."""
        kinds = {"prompt": self._check_prompt, "lora": self._check_lora}
        kind = event.get("type") if isinstance(event, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"an event is an object whose type is one of {', '.join(kinds)}.")
        return {"type": kind, **kinds[kind](event)}

    def _check_prompt(self, event: dict[str, Any]) -> dict[str, Any]:
        values = {"prompt": check_prompt(event.get("prompt"))}
        values |= {"transition": event.get("transition", "roll"), "num_blocks": event.get("num_blocks", 1)}
        check_whole_number("num_blocks", values["num_blocks"], MAX_TRANSITION_BLOCKS, least=1)
        PromptSwitch.parse(**values, transitions=self.pipe.transitions)
        return values

    def _check_lora(self, event: dict[str, Any]) -> dict[str, Any]:
        weights = event.get("weights")
        if not isinstance(weights, dict) or not weights:
            raise ValueError("weights must be an object of names and numbers.")
        for name, weight in weights.items():
            if name not in self.adapters:
                listed = f"there are {', '.join(self.adapters)}" if self.adapters else "none is loaded"
                raise ValueError(f"there is no LoRA {name!r}{close_matches(name, self.adapters)}; {listed}.")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not abs(weight) <= MAX_WEIGHT:
                raise ValueError(f"the weight of a LoRA must be a number from {-MAX_WEIGHT} to {MAX_WEIGHT}.")
            if weight != 1 and name in self.doras:
                raise ValueError(f"{name} is a DoRA, which can only be applied with weight 1.")
        return {"weights": {name: float(weight) for name, weight in weights.items()}}


def check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt must be text of at most {MAX_PROMPT} characters.")
    if len(parse_scenes(prompt)) > MAX_SCENES:
        raise ValueError(f"prompt must have at most {MAX_SCENES} scenes.")
    return prompt


def check_whole_number(name: str, value: Any, most: int, least: int = 0):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}.")
