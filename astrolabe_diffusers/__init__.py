"""Online reinforcement learning and streaming generation for causal video models, native to diffusers."""

from pathlib import Path

from .models.kv_cache import CausalWanKVCache
from .models.transformer_causal_wan import CausalWanTransformer3DModel
from .models.vae_streaming import StreamingVAEDecoder
from .pipelines.pipeline_causal_wan import CausalWanPipeline
from .pipelines.pipeline_output import CausalWanPipelineOutput
from .pipelines.stream import CausalWanStream
from .registration import register_with_diffusers


__version__ = "0.1.0"

# Folder of the embedded pipeline: a small, really trained model in the format of any other.
TINY_SHAPES = str(Path(__file__).parent / "assets" / "tiny_shapes")

for _cls in (CausalWanTransformer3DModel, CausalWanPipeline):
    register_with_diffusers(_cls)

__all__ = [
    "TINY_SHAPES",
    "CausalWanKVCache",
    "CausalWanPipeline",
    "CausalWanPipelineOutput",
    "CausalWanStream",
    "CausalWanTransformer3DModel",
    "StreamingVAEDecoder",
]
