"""Checkpoints in the published layouts, written from the list of names in the original code."""

import torch

from astrolabe_diffusers import CausalWanTransformer3DModel


def original_names(num_layers: int) -> dict[str, str]:
    """Original name -> diffusers name, one by one."""
    top = {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
    }
    linears = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        linears |= {f"{theirs}.{x}": f"{ours}.to_{x}" for x in "qkv"} | {f"{theirs}.o": f"{ours}.to_out.0"}
    names = {f"{a}.{end}": f"{b}.{end}" for a, b in top.items() for end in ("weight", "bias")}
    names["head.modulation"] = "scale_shift_table"
    for i in range(num_layers):
        block = f"blocks.{i}."
        names |= {f"{block}{a}.{e}": f"{block}{b}.{e}" for a, b in linears.items() for e in ("weight", "bias")}
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            names |= {f"{block}{theirs}.norm_{x}.weight": f"{block}{ours}.norm_{x}.weight" for x in "qk"}
        names[f"{block}modulation"] = f"{block}scale_shift_table"
    return names


def original_weights(transformer: CausalWanTransformer3DModel) -> dict[str, torch.Tensor]:
    weights = transformer.state_dict()
    names = original_names(transformer.config.num_layers)
    return {original: weights[name].clone() for original, name in names.items()}


# Name of a published model -> entry of its file with the generator, and what precedes each name.
_LAST, _AVERAGE = ("generator", "model."), ("generator_ema", "model.")
PUBLISHED_LAYOUTS = {
    "self-forcing": ("generator_ema", "model._fsdp_wrapped_module."),
    "causal-forcing-chunkwise": _LAST,
    "causal-forcing-framewise": _AVERAGE,
    "causal-forcing-framewise-2step": _AVERAGE,
    "causal-forcing-framewise-1step": _AVERAGE,
    "longlive": _LAST,
    "longlive-infinity": _LAST,
    "kvpo-longlive": _LAST,
    "memflow": _LAST,
    "kvpo-memflow": _LAST,
    "reward-forcing": (None, "model."),
    "sgf-plus-framewise": _AVERAGE,
    "sgf-plus-chunkwise": _AVERAGE,
    "krea-14b": (None, "model."),
    "raven": (None, ""),
    "one-forcing": _LAST,
    "infinity-rope": _AVERAGE,
    "rmd": _LAST,
    "self-gradient-forcing-framewise": _AVERAGE,
    "self-gradient-forcing-chunkwise": _AVERAGE,
}


def published_checkpoint(model: str, weights: dict[str, torch.Tensor]) -> dict:
    """Original weights in the layout of a published model's file; other entries, where it has any, are of no use."""
    entry, prefix = PUBLISHED_LAYOUTS[model]
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    return prefixed if entry is None else {"critic": {"head.head.bias": torch.zeros(1)}, entry: prefixed}
