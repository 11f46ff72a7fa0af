"""A seeded, random, very small pipeline of the real classes, and a prompt folder to go with it.

Default initialisation leaves a small network almost blind: queries and keys are nearly uniform, text and time barely
reach the output, and a test that compares two outputs then passes whatever the attention sees. The weights here are
drawn so that text, time, context and position all change the output visibly.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel


COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("black", "white", "gray", "blue")
DIRECTIONS = ("left", "right", "up", "down")

LATENT_CHANNELS = 4
TEXT_DIM = 32


def tiny_shapes_captions() -> list[str]:
    """Captions of all scenes of tiny_shapes with one object, in a fixed order.

    They have no "an", for which "a" is read as well: the random weights, and what tests know of them, hang on the
    vocabulary.
    """
    return [
        f"a {color} {shape} moves {direction} on a {background} background"
        for color in COLORS
        for shape in SHAPES
        for direction in DIRECTIONS
        for background in BACKGROUNDS
        if color != background
    ]


def write_prompt_folder(folder: str | Path, num_train: int = 8, num_test: int = 4, seed: int = 0) -> Path:
    """Writes `train.txt` and `test.txt`, one caption a line and no caption in both, and returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    captions = tiny_shapes_captions()
    random.Random(seed).shuffle(captions)
    (folder / "train.txt").write_text("\n".join(captions[:num_train]) + "\n")
    (folder / "test.txt").write_text("\n".join(captions[num_train : num_train + num_test]) + "\n")
    return folder


# Two tokens a frame, and little to decode: for tests that speak of neither.
SMALL = {"height": 16, "width": 32, "vae_num_res_blocks": 0}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word for caption in tiny_shapes_captions() for word in caption.split()}
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def tiny_vae(patch_size: int | None = None, is_residual: bool = False, num_res_blocks: int = 1) -> AutoencoderKLWan:
    """Spatial factor 8 (16 with `patch_size=2`), temporal factor 4, four latent channels with uneven statistics."""
    patched = {}
    if patch_size is not None:
        channels = 3 * patch_size**2
        patched = dict(
            patch_size=patch_size, in_channels=channels, out_channels=channels, scale_factor_spatial=8 * patch_size
        )
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=num_res_blocks,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
        is_residual=is_residual,
        **patched,
    ).eval()


@torch.no_grad()
def sharpen_transformer(transformer: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraws the weights in place so that every input of the transformer matters to its output.

    Matrices get entries of variance gain / fan_in; the gains keep the output near unit size in all configurations.
    """
    gains = {
        "to_q": 2.0,
        "to_k": 2.0,
        "to_v": 1.5,
        "to_out": 1.5,
        "time_embedder.linear_1": 2.0,
        "time_embedder.linear_2": 1.0,
        "time_proj": 0.5,
        "text_embedder.linear_1": 2.0,
        "text_embedder.linear_2": 2.0,
    }
    for name, parameter in transformer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale_shift_table"):
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 1:
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if is_norm else 0.0) + 0.2 * noise)
        else:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            parameter.copy_(noise * (gain / parameter[0].numel()) ** 0.5)


def tiny_transformer(seed: int = 0, **config) -> CausalWanTransformer3DModel:
    """A two-layer CausalWanTransformer3DModel in eval mode; `config` overrides any of its configuration."""
    defaults = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=64,
        num_frames_per_block=3,
    )
    transformer = CausalWanTransformer3DModel(**{**defaults, **config})
    sharpen_transformer(transformer, torch.Generator().manual_seed(seed))
    return transformer.eval()


def random_vae(**config) -> AutoencoderKLWan:
    """A very small autoencoder in float64, every parameter seen in what it gives."""
    defaults = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4)
    vae = AutoencoderKLWan(**{**defaults, "latents_std": [1.0] * 4, **config}).double()
    for name, parameter in vae.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return vae


def tiny_pipeline(
    seed: int = 0,
    vae_patch_size: int | None = None,
    vae_is_residual: bool = False,
    vae_num_res_blocks: int = 1,
    **overrides,
) -> CausalWanPipeline:
    """Builds the pipeline; any seed gives the same weights each time.

    `overrides` are arguments of the pipeline where it has one of that name (`num_frames=9`, `scheduler=...`) and
    configuration of the transformer otherwise (`num_frames_per_block=1`, `sink_size=1`, `num_layers=3`, ...).
    Defaults: 32x48 pixels, 21 frames (7 latent frames), 16 text tokens.
    """
    pipeline_names = (
        "sigmas",
        "first_block_sigmas",
        "num_context_frames",
        "past_weight",
        "max_sequence_length",
        "height",
        "width",
        "num_frames",
        "frame_rate",
    )
    component_names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "tiny_decoder")
    arguments = dict(max_sequence_length=16, height=32, width=48, num_frames=21)
    arguments |= {k: overrides.pop(k) for k in pipeline_names + component_names if k in overrides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = arguments.pop("tokenizer", None) or tiny_tokenizer()
        components = dict(
            tokenizer=tokenizer,
            text_encoder=tiny_text_encoder(len(tokenizer)),
            vae=tiny_vae(vae_patch_size, vae_is_residual, vae_num_res_blocks),
            scheduler=FlowMatchLCMScheduler(shift=5.0),
            transformer=tiny_transformer(seed, **overrides),
        )
    pipe = CausalWanPipeline(**{**components, **arguments})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_pipeline(folder: str | Path, **overrides) -> Path:
    """Saves `tiny_pipeline(**overrides)` as a Diffusers folder, with prompts in `<folder>/prompts`, and returns it."""
    folder = Path(folder)
    tiny_pipeline(**overrides).save_pretrained(folder)
    write_prompt_folder(folder / "prompts")
    return folder


def model_index(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "model_index.json").read_text())
