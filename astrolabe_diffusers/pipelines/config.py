"""Settings of a pipeline: which, and how it is loaded and placed."""

from dataclasses import dataclass
from pathlib import Path

from .. import TINY_SHAPES
from ..config import Config, option
from ..errors import UserError, as_user_error
from .quantization import QUANTIZATIONS
from .scene_prompt import check_sequence_length


DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")


@dataclass
class ModelConfig(Config):
    """A model, and the size of what it makes."""

    model: str = option(TINY_SHAPES, "folder or Hub id of a CausalWanPipeline, or tiny_shapes, the embedded one")
    revision: str | None = option(None, "revision of the model on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as bf16")
    height: int | None = option(None, "height of the videos in pixels; the model's own if not given", minimum=1)
    width: int | None = option(None, "width of the videos in pixels; the model's own if not given", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.model == Path(TINY_SHAPES).name and not Path(self.model).exists():
            self.model = TINY_SHAPES


@dataclass
class PipelineConfig(ModelConfig):
    """How the model is loaded for generation, and what is done with it; see [`~loading.load_pipeline`]."""

    lora: dict[str, float] = option(
        {}, "LoRAs, PATH or PATH=WEIGHT: folders of training runs or of checkpoints, files, or Hub ids", many=True
    )
    max_sequence_length: int | None = option(None, "text tokens; the model's own if not given")
    dtype: str | None = option(None, "float32 on a CPU and bfloat16 elsewhere if not given", choices=DTYPES)
    quantization: str | None = option(
        None, "8-bit linear layers by torchao, in bfloat16, and not the exact frames", choices=QUANTIZATIONS
    )
    offload: str = option("none", "what leaves the GPU while it is not used", choices=OFFLOADS)
    compile: bool = option(False, "compile the transformer first, for many videos; they differ by rounding")
    vae: str | None = option(
        None, "encode and decode with this file or folder, such as LightVAE, in the place of the model's autoencoder"
    )
    tiny_decoder: str | None = option(
        None, "decode with this published file or folder: fast, and not the exact frames"
    )
    vae_tiling: bool = option(False, "decode in tiles, with less memory")
    attention_backend: str | None = option(None, "a backend of diffusers; torch's fastest exact kernel if not given")

    def __post_init__(self):
        super().__post_init__()
        if self.compile and self.offload == "group":
            raise UserError("compile needs offload none or model: layers that come one by one cannot be compiled.")
        if self.quantization and self.dtype not in (None, "bfloat16"):
            raise UserError(f"quantization needs dtype bfloat16, not {self.dtype}: what is not quantised is in that.")
        if self.max_sequence_length is not None:
            with as_user_error("settings"):
                check_sequence_length(self.max_sequence_length)
