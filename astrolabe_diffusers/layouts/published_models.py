"""How the published models were trained, hence how they generate: what conversion writes into their configs."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import close_matches


@dataclass(frozen=True)
class PublishedModel:
    source: str  # where the weights are published
    weights: tuple[str, ...]  # entries of a training checkpoint with the generator, the one its authors load first
    transformer: dict[str, Any] = field(default_factory=dict)  # its config, beside the base model's sizes
    pipeline: dict[str, Any] = field(default_factory=dict)  # its config
    size: str = "1.3B"  # of the Wan2.1 model it was trained from, or "14B"


_FOUR_STEPS = [1.0, 0.75, 0.5, 0.25]
_AVERAGE, _LAST = ("generator_ema", "generator"), ("generator", "generator_ema")
_FRAMEWISE = {"num_frames_per_block": 1}
_MEMFLOW = {"sink_size": 3, "local_attn_size": 12, "memory_bank_size": 3, "memory_bank_update": "interactive"}

PUBLISHED_MODELS = {
    "self-forcing": PublishedModel("gdhe17/Self-Forcing, checkpoints/self_forcing_dmd.pt", _AVERAGE),
    "causal-forcing-chunkwise": PublishedModel("zhuhz22/Causal-Forcing, chunkwise/causal_forcing.pt", _LAST),
    "causal-forcing-framewise": PublishedModel(
        "zhuhz22/Causal-Forcing, framewise/causal_forcing.pt", _AVERAGE, _FRAMEWISE
    ),
    "causal-forcing-framewise-2step": PublishedModel(
        "zhuhz22/Causal-Forcing, causal-forcing++/framewise-2step.pt",
        _AVERAGE,
        _FRAMEWISE,
        {"sigmas": [1.0, 0.5], "first_block_sigmas": _FOUR_STEPS},
    ),
    "causal-forcing-framewise-1step": PublishedModel(
        "zhuhz22/Causal-Forcing, causal-forcing++/framewise-1step.pt",
        _AVERAGE,
        _FRAMEWISE,
        {"sigmas": [1.0], "first_block_sigmas": _FOUR_STEPS},
    ),
    "longlive": PublishedModel(
        "Efficient-Large-Model/LongLive-1.3B, models/longlive_base.pt and lora.pt",
        (*_LAST, "model"),
        {"sink_size": 3, "local_attn_size": 12},
        {"num_frames": 477},
    ),
    "memflow": PublishedModel(
        "KlingTeam/MemFlow, base.pt and lora.pt", (*_LAST, "model"), _MEMFLOW, {"num_frames": 957}
    ),
    "kvpo-memflow": PublishedModel(
        "Richard-ZZZZZ/KVPO, memflow/base.pt and lora.pt", (*_LAST, "model"), _MEMFLOW, {"num_frames": 585}
    ),
    "krea-14b": PublishedModel(
        "krea/krea-realtime-video, krea-realtime-video-14b.safetensors",
        (),
        pipeline={"sigmas": [*_FOUR_STEPS, 0.0], "num_context_frames": 3, "num_frames": 105},
        size="14B",
    ),
}


def find_published_model(name: str) -> PublishedModel:
    """The model of [`PUBLISHED_MODELS`] by that name; a `ValueError` if there is none."""
    if name not in PUBLISHED_MODELS:
        raise ValueError(
            f"there is no published model {name!r}{close_matches(name, PUBLISHED_MODELS)}; there are "
            f"{', '.join(PUBLISHED_MODELS)}."
        )
    return PUBLISHED_MODELS[name]
