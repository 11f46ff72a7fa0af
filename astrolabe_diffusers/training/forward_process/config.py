"""Settings of algorithms that train on the forward process."""

from dataclasses import dataclass

from ...config import option
from ...errors import UserError
from ...layouts.experts import MEMORY_TRANSFORMER
from ..config import OnlineConfig


@dataclass
class ForwardProcessConfig(OnlineConfig):
    """Settings of algorithms that noise the sampled videos and compare predictions of the clean ones."""

    kl_weight: float = option(1e-4, "weight of the squared distance to the reference; 0 saves its pass", minimum=0)
    context: str = option(
        "clean",
        "what a block sees of those before it in training: as in inference; likewise, in one pass and with gradients "
        "through what it sees; or, as in the release, noised with it, and in its window only, without the sink",
        choices=("clean", "clean_grad", "noisy"),
    )
    blocks_per_pass: int = option(
        7,
        "context=clean: blocks of the window that go through the transformer together, and have one backward pass; "
        "fewer take less memory, and on a GPU that one does not fill more time",
        minimum=1,
    )
    train_timesteps: str = option(
        "warped",
        "noise levels that are trained: the sampler's own, or those before its shift (1000 750 500 250)",
        choices=("warped", "raw"),
    )
    train_steps: list[int] = option(
        [], "which of the sampler's steps are trained, from 0, where all is noise; all if not given"
    )
    adv_clip_max: float = option(5.0, "advantages are clipped to +-this", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.context != "clean" and self.window_size is not None:
            raise UserError(f"context={self.context} trains a whole video in one pass: no window_size.")
        if MEMORY_TRANSFORMER in self.lora_components and self.context != "clean_grad":
            raise UserError(
                f"lora_expert={self.lora_expert}: the memory transformer learns nothing with context={self.context}, "
                "which has no gradients through what it writes; set context=clean_grad."
            )
