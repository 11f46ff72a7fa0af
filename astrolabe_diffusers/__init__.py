"""Online reinforcement learning and streaming generation for causal video models, native to diffusers."""

from pathlib import Path

from .registration import announce_to_diffusers, lazy_names


__version__ = "0.1.0"

# Folder of the embedded pipeline: a small, really trained model in the format of any other.
TINY_SHAPES = str(Path(__file__).parent / "assets" / "tiny_shapes")

__getattr__, __dir__, _names = lazy_names(
    __name__,
    {
        ".models.kv_cache": ["CausalWanKVCache"],
        ".models.tiny_decoder": ["StreamingTinyDecoder", "TinyWanDecoder"],
        ".models.transformer_causal_wan": ["CausalWanTransformer3DModel"],
        ".models.vae_streaming": ["StreamingVAEDecoder"],
        ".pipelines.pipeline_causal_wan": ["CausalWanPipeline"],
        ".pipelines.stream": ["CausalWanPipelineOutput", "CausalWanStream"],
        ".training": ["NFTConfig", "NFTTrainer", "OnlineConfig", "OnlineTrainer", "TrainerCallback"],
    },
)
__all__ = ["TINY_SHAPES", *_names]

announce_to_diffusers(
    {
        "CausalWanPipeline": f"{__name__}.pipelines.pipeline_causal_wan",
        "CausalWanTransformer3DModel": f"{__name__}.models.transformer_causal_wan",
        "TinyWanDecoder": f"{__name__}.models.tiny_decoder",
    }
)
