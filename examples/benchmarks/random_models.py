"""Models at full size with random weights, which have the speed and the memory of the real ones."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, ModelMixin
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline, CausalWanTransformer3DModel, TinyWanDecoder
from astrolabe_diffusers.layouts.experts import MEMORY_TRANSFORMER, TRANSFORMER
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.pipelines.loading import load_tiny_decoder


# Wan2.1's two sizes, and google/umt5-xxl.
WAN_SIZES = {
    "1.3B": dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "14B": dict(num_attention_heads=40, num_layers=40, ffn_dim=13824),
}
UMT5_XXL = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


def recipe_of(recipe: str | None, model: str | None) -> str | None:
    """The published model that is meant: `--model` named it once, and still does where there is no such folder."""
    return model if recipe is None and model in PUBLISHED_MODELS and not Path(model).exists() else recipe


def random_pipeline(
    recipe: str, device: str, dtype: torch.dtype = torch.bfloat16, home: str | None = None
) -> CausalWanPipeline:
    """`recipe` is a key of `PUBLISHED_MODELS`. The weights are drawn on the `device`, where it is fast, and kept at
    `home`, the same device if not given. Of models that are to be offloaded it never has more than one weight."""
    torch.manual_seed(0)  # the same on every process
    published = PUBLISHED_MODELS[recipe]
    with init_empty_weights():
        experts = [
            CausalWanTransformer3DModel(**WAN_SIZES[published.size], **published.transformer)
            for _ in range(published.experts)
        ]
        text_encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    experts = [random_weights(expert, device, dtype, home) for expert in experts]
    return CausalWanPipeline(
        # Any: only the number of tokens, which is padded, costs time.
        tokenizer=AutoTokenizer.from_pretrained(TINY_SHAPES, subfolder="tokenizer"),
        text_encoder=random_weights(text_encoder, device, dtype, home),
        vae=AutoencoderKLWan().to(home or device, dtype).eval(),
        scheduler=FlowMatchLCMScheduler(shift=5.0),
        **dict(zip((TRANSFORMER, MEMORY_TRANSFORMER), experts)),
        **published.pipeline,
    )


def random_weights(
    model: torch.nn.Module, device: str, dtype: torch.dtype, home: str | None = None
) -> torch.nn.Module:
    """Give a model on the meta device random weights that keep the scale of what passes through them, drawn on one
    device and kept at `home`, the same if not given; what diffusers keeps in float32 is in float32."""
    home = home or device
    keep = set(model._keep_in_fp32_modules) if isinstance(model, ModelMixin) else set()
    for name, parameter in list(model.named_parameters()):
        target = dtype if keep.isdisjoint(name.split(".")) else torch.float32
        value = torch.full(parameter.shape, float(name.endswith("weight")), device=device, dtype=target)
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        set_module_tensor_to_device(model, name, home, value, dtype=target)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(home).eval()


def add_tiny_decoder(pipe: CausalWanPipeline, name: str, dtype: torch.dtype):
    """The one in the file or folder `name`, or of `random` weights, where the pipeline's own decoder is."""
    if name == "random":
        pipe.register_modules(tiny_decoder=TinyWanDecoder(pipe.vae.config.z_dim).to(dtype).eval())
    else:
        load_tiny_decoder(pipe, name, dtype)
    pipe.tiny_decoder.to(pipe.vae.device)
