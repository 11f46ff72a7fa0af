"""Settings of algorithms that predict the blocks of the sampled videos again."""

from dataclasses import dataclass

from ...config import option
from ...errors import UserError
from ...layouts.experts import MEMORY_TRANSFORMER
from ..config import OnlineConfig


@dataclass
class BlockwiseConfig(OnlineConfig):
    """Settings of algorithms that predict the clean blocks of the sampled videos from noisy ones."""

    kl_weight: float = option(1e-4, "weight of the squared distance to the reference; 0 saves its pass", minimum=0)
    context: str = option(
        "clean",
        "what a block sees of those before it in training: as in inference; or likewise, the window in one pass, and "
        "with gradients through what it sees of that",
        choices=("clean", "clean_grad"),
    )
    blocks_per_pass: int | None = option(
        None,
        "context=clean: blocks of the window that go through the transformer together, and have one backward pass; "
        "fewer take less memory, and on a GPU that one does not fill more time; if not given as many as make "
        "about 7 with those of the batch's other videos that are trained",
        minimum=1,
    )
    train_steps: list[int] = option(
        [], "which of the sampler's steps are trained, from 0, where all is noise; all if not given"
    )
    adv_clip_max: float = option(5.0, "advantages are clipped to +-this", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.transitions and self.context != "clean":
            raise UserError(f"transitions need context=clean, in which blocks see what they did, not {self.context}.")
        if MEMORY_TRANSFORMER in self.lora_components and self.context != "clean_grad":
            raise UserError(
                f"lora_expert={self.lora_expert}: the memory transformer learns nothing with context={self.context}, "
                "which has no gradients through what it writes; set context=clean_grad."
            )

    @property
    def num_pass_blocks(self) -> int:
        """`blocks_per_pass`, or what it is if not given: of one video a clip of 81 frames, of more the same memory."""
        if self.blocks_per_pass is not None:
            return self.blocks_per_pass
        return max(7 // (self.trained_videos * self.draws_per_video), 1)


@dataclass
class ForwardProcessConfig(BlockwiseConfig):
    """Settings of algorithms that noise the sampled videos and compare predictions of the clean ones."""

    context: str = option(
        "clean",
        "what a block sees of those before it in training: as in inference; likewise, the window in one pass, and "
        "with gradients through what it sees of that; or, as in the release, noised with it, and in its window only, "
        "without the sink",
        choices=("clean", "clean_grad", "noisy"),
    )
    train_timesteps: str = option(
        "warped",
        "noise levels that are trained: the sampler's own, or those before its shift (1000 750 500 250)",
        choices=("warped", "raw"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.context == "noisy" and self.window_size is not None:
            raise UserError("context=noisy trains a whole video in one pass: no window_size.")
