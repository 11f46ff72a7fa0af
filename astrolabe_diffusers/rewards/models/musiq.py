"""MUSIQ, a transformer on patches of several sizes, on the frames of a video."""

from dataclasses import KW_ONLY, dataclass

from ...layouts.tensor_files import find_weights
from ..registry import register_reward
from .model_reward import FrameReward, fetch, fill, read_weights


_WEIGHTS = ("musiq_spaq_ckpt-358bb6af.pth",)


@register_reward("musiq")
@dataclass(eq=False)
class Musiq(FrameReward):
    """
    How good the frames are as photographs: sharp, well exposed, without noise; the prompt does not count.

    - Range: about 0 to 1, a hundredth of the mean opinion score that the weights were trained on.
    - Frames: every one in its own size, and their mean. MUSIQ itself also looks at copies of 384 and 224 pixels on
      the longer side.
    - Cost: 27 million parameters, some 500 patches a frame of 480 x 832.
    - Weights: pyiqa's `musiq_spaq_ckpt-358bb6af.pth`, trained on SPAQ, as CM-GRPO has it; its KonIQ-10k and PaQ-2-PiQ
      files fit too. Paper: arXiv 2108.05997. Without pyiqa, whose model it is, there is an `ImportError`.

    Args:
        checkpoint: file or folder of the weights, or Hub id of a repository that holds them under this name.
        frames, fps, top_fraction, batch_size, device, dtype: see [`FrameReward`].
    """

    uses_prompt = False

    checkpoint: str | None = None
    _: KW_ONLY
    dtype: str | None = "float32"

    def __post_init__(self):
        super().__post_init__()
        try:
            from pyiqa.archs.musiq_arch import MUSIQ
        except (ImportError, RuntimeError) as error:  # the second from a torchvision that is made for another torch
            raise ImportError(f"musiq needs pyiqa: pip install pyiqa ({error})") from None
        if self.checkpoint is None:
            raise ValueError(f"musiq needs a checkpoint, pyiqa's file {_WEIGHTS[0]}.")
        weights = read_weights(find_weights(fetch(self.checkpoint, list(_WEIGHTS)), _WEIGHTS))
        self.model = MUSIQ(pretrained=False)
        fill(self.model, weights, "this is no MUSIQ with one score, as pyiqa has it")
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)

    def score_frames(self, frames, texts):
        return self.model((frames.float() / 255).to(self.dtype))[:, 0] / 100
