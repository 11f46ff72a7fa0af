"""The application of settings, and videos of sessions that were saved."""

import math
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError, as_user_error
from ..files.output_folder import RunFolder
from ..files.text import read_json
from ..files.video import VideoWriter
from ..files.writing import writing
from ..generation.config import GenerationConfig
from ..generation.run import make_accelerator
from ..pipelines.config import PipelineConfig
from ..pipelines.loading import load_pipeline, prepare_pipeline
from ..rollout.prompts import read_prompts
from ..shareable import shareable_value
from .app import LiveApp
from .config import LiveConfig
from .engine import LiveEngine
from .model import FRAME_SETTINGS, LiveModel
from .record import check_form, check_record
from .session import LiveSession, replay


# Prompts that a page offers, of those that lie beside a model.
PRESETS = ("presets.txt", "test.txt")
NUM_PRESETS = 8


def load_live_app(config: LiveConfig, token: str | None = None) -> LiveApp:
    """The application of a model, loaded and warm, whose context is still to be entered.

    Raises:
        UserError: a mistake in the settings.
    """
    with as_user_error(f"device {config.device}", (RuntimeError,)):
        device = torch.device(config.device) if config.device else None
    model = load_model(config, config.num_frames, config.max_pixels, device)
    if config.compile:
        compile_model(model)
    warm_up(model)
    with as_user_error("codecs"):
        return LiveApp(
            model,
            LiveEngine(config.sessions, config.waiting, config.idle_seconds),
            token,
            config.public,
            config.codecs,
            read_presets(config.model),
            config.max_recordings,
            config.max_recording_seconds,
        )


def load_model(
    config: PipelineConfig, num_frames: int | None, max_pixels: float | None, device: torch.device | None = None
) -> LiveModel:
    """The model of these settings on its device, by default the GPU if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe, _ = load_pipeline(config, device)
    sizes = {name: value for name in ("height", "width") if (value := getattr(config, name))}
    with as_user_error("video size"):
        pipe.check_size(sizes.get("height", pipe.config.height), sizes.get("width", pipe.config.width))
    pipe.register_to_config(**sizes)
    prepare_pipeline(pipe, device, config.offload, config.vae_tiling, config.attention_backend)
    settings = {name: getattr(config, name) for name in FRAME_SETTINGS}
    with as_user_error("num_frames"):
        return LiveModel(pipe, shareable_value(config.model), config.lora, num_frames, max_pixels, **settings)


def compile_model(model: LiveModel):
    print(f"compiled in {model.pipe.compile(**model.stream_settings):.0f} s", flush=True)


def warm_up(model: LiveModel):
    """Blocks of nobody's until the window is full, then one with a new prompt and two more: what a process does for
    the first time takes longer."""
    config = model.pipe.transformer.config
    full = max(config.local_attn_size // config.num_frames_per_block, 2)
    session = LiveSession(model, "", 0)
    with suppress(StopIteration):  # a video may be shorter
        for number in range(full + 3):
            if number == full:
                session.send({"type": "prompt", "prompt": ""})
            (block,), _ = session.make_block()
            model.block_seconds = block.seconds
    session.close()


def read_presets(model: str) -> list[str]:
    """Those of the folder `prompts` beside a local model, if any."""
    paths = (Path(model) / "prompts" / name for name in PRESETS)
    path = next((path for path in paths if path.is_file()), None)
    return [prompt.text for prompt in read_prompts(path)[:NUM_PRESETS]] if path else []


def generate_session(config: GenerationConfig):
    """
    Makes the frames of a session again that `astrolabe live` has saved, bit for bit on the CPU that made them, and
    writes them as an MP4 of the session's name, with `compare` another one of the base.

    Raises:
        UserError: the file is no session, or is not of this model and its LoRAs.
    """
    path = Path(config.session)
    with as_user_error(f"session {path.name}"):
        record = check_form(read_json(path))
        names = [name for name in ("dtype", *FRAME_SETTINGS) if name in record]
        config = replace(config, **{name: getattr(config, name) or record[name] for name in names})
    lanes = ("-base", "") if record.get("compare") else ("",)
    files = [Path(config.output_dir) / f"{path.stem}{lane}.mp4" for lane in lanes]
    with RunFolder(config.output_dir, "generation"):
        if present := [str(file) for file in files if file.exists()]:
            raise UserError(f"{present[0]} is there already: name another --output_dir.")
        model = load_model(config, record.get("num_frames"), math.inf, make_accelerator().device)
        with as_user_error(f"session {path.name}"):
            check_record(model, record)
        if config.compile:
            compile_model(model)
        with as_user_error(f"session {path.name}"), writing(f"to {config.output_dir}"), ExitStack() as stack:
            writers = []
            for blocks in replay(model, record):
                if not writers:
                    size = *blocks[0].frames.shape[1:3], model.frame_rate
                    writers = [stack.enter_context(VideoWriter(file, *size)) for file in files]
                for writer, block in zip(writers, blocks, strict=True):
                    writer.write(block.frames)
        if not writers:
            raise UserError(f"session {path.name} has no blocks.")
    print(f"{writers[0].num_frames} frames; {', '.join(map(str, files))}")
