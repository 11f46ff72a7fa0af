"""Models with LoRAs for sessions on the random tiny pipeline, and what sessions are sent."""

from __future__ import annotations

from pathlib import Path

import torch

from astrolabe_diffusers.live.model import LiveModel
from astrolabe_diffusers.live.session import LiveSession
from astrolabe_diffusers.pipelines.loading import load_loras
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.pipelines.test_scenes import TWO_STEPS, A, B, C
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import policy_pipeline


# A model whose videos may go on for ever, in frames of 16x32 pixels.
ENDLESS = {**TWO_STEPS, "local_attn_size": 9, "sink_size": 3, "rope_mode": "relative"}


def save_loras(folder: Path) -> list[Path]:
    """Files of two LoRAs, `first` and `second`, that change frames a lot, and not alike."""
    folder.mkdir(exist_ok=True)
    transformer = policy_pipeline(**ENDLESS).transformer
    paths = []
    for adapter, name in (("default", "first"), ("old", "second")):
        (folder / name).mkdir()
        save_adapter(transformer, folder / name, adapter, "pytorch_lora_weights.safetensors")
        paths.append(folder / name)
    return paths


def make_model(loras: dict[Path, float] | None = None, config: dict | None = None, **settings) -> LiveModel:
    """`config` overrides any of the pipeline's."""
    pipe = tiny_pipeline(**ENDLESS | (config or {}))
    loras = {str(path): weight for path, weight in (loras or {}).items()}
    if loras:
        load_loras(pipe, loras)
    return LiveModel(pipe, "tiny", loras, **settings)


def make_blocks(session: LiveSession, number: int, lane: int = 0) -> list[torch.Tensor]:
    return [torch.from_numpy(session.make_block()[0][lane].frames) for _ in range(number)]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def prompt(text, **values):
    return {"type": "prompt", "prompt": text, **values}


def lora(**weights):
    return {"type": "lora", "weights": weights}


def steered(model, **settings):
    """A session with every kind of change, and its frames."""
    session = LiveSession(model, A, 7, **settings)
    session.send(lora(second=0.4))
    blocks = [session.make_block()[0]]
    for event in (
        prompt(B, transition="recache"), lora(first=0.3), prompt(C, num_blocks=3), prompt(A, transition="cut"),
    ):  # fmt: skip
        session.send(event)
        blocks += [session.make_block()[0], session.make_block()[0]]
    return session, blocks
