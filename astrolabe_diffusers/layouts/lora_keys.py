"""What a key of a LoRA file means, whatever trained it."""

import re

from .wan_checkpoints import IN_BLOCK, OUTSIDE, WRAPPERS, diffusers_name


# Around the name of a module: peft's and trainers' wrappers, diffusers, ComfyUI, DiffSynth.
_PREFIXES = re.compile(r"^(?:(?:base_model|model|module|diffusion_model|transformer|pipe|dit|net|generator)\.)+")
# kohya and LyCORIS write the name with underscores.
_FLAT_PREFIX = re.compile(r"^(?:lora_unet|lora_transformer|lycoris(?:_unet|_transformer)?)_")

_ENDS = {
    "A": r"lora_A(?:\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight",
    "B": r"lora_B(?:\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight",
    "B.bias": r"lora_B(?:\.[^.]+)?\.bias",
    "alpha": r"alpha",
    "magnitude": r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|dora_scale",
    "diff": r"(?:lora_)?diff(?:\.weight)?",  # with .weight as peft saves our layers
    "diff_b": r"(?:lora_)?diff_b(?:\.weight)?",
    "diff_m": r"diff_m",
}

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

_NAMES = {*IN_BLOCK, *IN_BLOCK.values(), *OUTSIDE, *OUTSIDE.values(), "patch_embedding", "head"}
_NAMES |= {f"cross_attn.{name}_img" for name in ("k", "v", "norm_k")}
_DOTTED = {name.replace(".", "_"): name for name in _NAMES if name != "scale_shift_table"}


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
    for kind, end in _ENDS.items():
        match = re.fullmatch(rf"(.+)\.(?:{end})", key)
        if match and (module := _module(match[1], kind)):
            return module, "diff" if kind == "diff_m" else kind, WRAPPERS.sub("", match[1])
    raise ValueError(f"this is no LoRA of Wan, or not only: it holds {key}.")


def trainer_names(name: str) -> list[str]:
    """What the trainer may have called a module of this name in the file: first it without all prefixes, last as it
    is. peft looks a module up by a name that has not yet the ones that its own files have."""
    bare = _PREFIXES.sub("", name)
    prefixes = name.removesuffix(bare).split(".")[:-1]
    return [".".join([*prefixes[i:], bare]) for i in range(len(prefixes), -1, -1)]


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
    # Ours is `modulation`, in a block or in the transformer itself.
    return diffusers_name("head.modulation" if name == "modulation" else name)
