"""What a key of a LoRA file means, whatever trained it."""

from __future__ import annotations

import re

from .wan_checkpoints import _WRAPPERS, diffusers_name


# Around the name of a module: peft's and trainers' wrappers, diffusers, ComfyUI, DiffSynth.
_PREFIXES = re.compile(r"^(?:(?:base_model|model|module|diffusion_model|transformer|pipe|dit|net|generator)\.)+")
# kohya and LyCORIS write the name with underscores.
_FLAT_PREFIX = re.compile(r"^(?:lora_unet|lora_transformer|lycoris(?:_unet|_transformer)?)_")

_ENDS = [
    (re.compile(rf"^(.+)\.(?:{pattern})$"), kind)
    for pattern, kind in (
        (r"lora_A(?:\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight", "A"),
        (r"lora_B(?:\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight", "B"),
        (r"lora_B(?:\.[^.]+)?\.bias", "B.bias"),
        (r"alpha", "alpha"),
        (r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|dora_scale", "magnitude"),
        (r"(?:lora_)?diff(?:\.weight)?", "diff"),  # with .weight as peft saves our layers
        (r"(?:lora_)?diff_b(?:\.weight)?", "diff_b"),
        (r"diff_m", "diff_m"),
    )
]

# Adapters that are no LoRA, by a part of their keys.
_OTHERS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon in three factors",
    "on_input": "(IA)3",
    "ia3_l": "(IA)3",
    "vera_lambda": "VeRA",
}

_ATTENTION = [f"self_attn.{x}" for x in ("q", "k", "v", "o", "norm_q", "norm_k")]
_ATTENTION += [f"cross_attn.{x}" for x in ("q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img")]
_ATTENTION += [f"attn{i}.{x}" for i in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")]
_IN_BLOCK = [*_ATTENTION, "ffn.0", "ffn.2", "ffn.net.0.proj", "ffn.net.2", "norm2", "norm3", "modulation"]
_OUTSIDE = ["patch_embedding", "time_projection.1", "head", "head.head", "head.modulation", "proj_out"]
_OUTSIDE += [f"{x}_embedding.{i}" for x in ("text", "time") for i in (0, 2)]
_OUTSIDE += [f"condition_embedder.{x}_embedder.linear_{i}" for x in ("text", "time") for i in (1, 2)]
_OUTSIDE += ["condition_embedder.time_proj"]
_DOTTED = {name.replace(".", "_"): name for name in (*_IN_BLOCK, *_OUTSIDE)}


def parse_key(key: str) -> tuple[str, str, str]:
    """
    The module that a key of a LoRA file changes, and how.

    Returns:
        Its name in diffusers, where a modulation table is a module with a weight (`blocks.0.scale_shift_table`); one
        of `"A"`, `"B"`, `"B.bias"`, `"alpha"`, `"magnitude"` (DoRA), `"diff"` and `"diff_b"`, which are added to its
        weight and bias; its name in the file.

    Raises:
        ValueError: the key is none of a LoRA; in words if it is another adapter's.
    """
    for part, kind in _OTHERS.items():
        if part in key:
            raise ValueError(f"this is a {kind}, not a LoRA: it holds {key}.")
    for pattern, kind in _ENDS:
        match = pattern.match(key)
        module = match and _module(match[1], kind)
        if module:
            return module, "diff" if kind == "diff_m" else kind, _WRAPPERS.sub("", match[1])
    raise ValueError(f"this is no LoRA of Wan, or not only: it holds {key}.")


def _module(name: str, kind: str) -> str | None:
    name = _PREFIXES.sub("", name)
    flat, count = _FLAT_PREFIX.subn("", name)
    if count:
        block = re.fullmatch(r"(blocks_\d+)(?:_(.+))?", flat)
        head, rest = (block[1].replace("_", ".") + ".", block[2]) if block else ("", flat)
        if rest is not None and rest not in _DOTTED:
            return None
        name = head.removesuffix(".") if rest is None else head + _DOTTED[rest]
    if kind == "diff_m":
        name += ".modulation"
    if name.endswith("modulation"):
        # Ours is `modulation`, in a block or in the transformer itself.
        return diffusers_name("head.modulation" if name == "modulation" else name)
    return diffusers_name(name + ".").removesuffix(".")
