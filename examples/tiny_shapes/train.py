"""Makes the embedded pipeline: `python examples/tiny_shapes/train.py --output_dir DIR`, on one GPU.

Stages whose results are in the folder are not run again, and one that was interrupted goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from autoencoder import LATENT_CHANNELS, build_autoencoder, measure_latents, train_autoencoder
from data import SIZE, write_prompts
from denoiser import Denoiser, build_transformer, distill, encode_clips, solve_trajectories, train_flow_matching
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler
from figures import write_figures
from text import MAX_SEQUENCE_LENGTH, build_text_encoder, build_tokenizer
from transformers import UMT5EncoderModel

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.models.vae_streaming import use_channels_last
from astrolabe_diffusers.training import exit_code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder_steps", type=int, default=20000)
    parser.add_argument("--num_clips", type=int, default=40960)
    parser.add_argument("--flow_steps", type=int, default=14000)
    parser.add_argument("--num_trajectories", type=int, default=10240)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the trajectories that are distilled")
    parser.add_argument("--distill_steps", type=int, default=9000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--switch_prob", type=float, default=0.4, help="share of clips that change scene")
    parser.add_argument("--num_eval", type=int, default=128, help="held-out videos for each figure")
    return parser.parse_args(argv)


def assemble(vae: AutoencoderKLWan, folder: Path | None, device: torch.device) -> tuple[CausalWanPipeline, Denoiser]:
    """The pipeline around the autoencoder: text encoder and transformer of `folder`, or new ones."""
    tokenizer = build_tokenizer()
    if folder is None:
        text_encoder = build_text_encoder(tokenizer)
        transformer = build_transformer(text_encoder.config.d_model, LATENT_CHANNELS)
    else:
        text_encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder")
        transformer = CausalWanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    for part in (vae, transformer):
        part.register_to_config(_name_or_path="")  # a path of this machine, which would be saved
    model = Denoiser(text_encoder.float(), transformer.float()).to(device).train()
    pipe = CausalWanPipeline(
        tokenizer,
        model.text_encoder,
        vae,
        FlowMatchLCMScheduler(shift=5.0),
        model.transformer,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        height=SIZE,
        width=SIZE,
        num_frames=21,
        frame_rate=16,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    seconds = output / "seconds.json"
    took = json.loads(seconds.read_text()) if seconds.is_file() else {}

    def done(stage: str, began: float) -> None:
        """A resumed stage counts the time after it was resumed."""
        took[stage] = round(time.time() - began)
        seconds.write_text(json.dumps(took))
        (output / f"{stage}.pt").unlink(missing_ok=True)
        print(f"{stage}: {took[stage]} s", flush=True)

    def missing(stage: str, result: str) -> bool:
        """A folder alone may be half written."""
        return stage not in took or not (output / result).exists()

    began = time.time()
    if missing("autoencoder", "vae"):
        vae, resume = build_autoencoder(), output / "autoencoder.pt"
        clips = args.num_clips // 3
        train_autoencoder(vae, clips, args.autoencoder_steps, args.batch_size, device, args.seed + 1, resume)
        measure_latents(vae, args.num_clips // 32, device, args.seed + 2)
        vae.save_pretrained(output / "vae")
        done("autoencoder", began)
    # Also after training: what is encoded later shall be the same, whether or not this stage was run again.
    vae = AutoencoderKLWan.from_pretrained(output / "vae").to(device).requires_grad_(False)
    use_channels_last(vae)

    def bank():
        return encode_clips(vae, build_tokenizer(), args.num_clips, args.switch_prob, device, args.seed + 3)

    began, clips = time.time(), None
    if missing("flow_matching", "teacher"):
        torch.manual_seed(args.seed + 4)  # the weights to begin with
        pipe, model = assemble(vae, None, device)
        clips = bank()
        train_flow_matching(model, clips, args.flow_steps, args.batch_size, args.seed + 4, output / "flow_matching.pt")
        pipe.save_pretrained(output / "teacher")
        done("flow_matching", began)

    began = time.time()
    if missing("distillation", "model_index.json"):
        pipe, model = assemble(vae, output / "teacher", device)
        clips = clips or bank()
        trajectories = solve_trajectories(model, clips, args.num_trajectories, args.guidance_scale, args.seed + 5)
        print(f"solved {len(trajectories)} trajectories, {time.time() - began:.0f} s", flush=True)
        resume = output / "distillation.pt"
        distill(model, clips, trajectories, args.distill_steps, args.batch_size, args.seed + 6, resume)
        # Half the size, and as good; what loads it computes in float32 unless told otherwise.
        pipe.transformer.bfloat16()
        write_prompts(output / "prompts")
        (output / "figures.json").unlink(missing_ok=True)
        pipe.save_pretrained(output)
        done("distillation", began)

    if not (output / "figures.json").is_file():
        write_figures(output, output, number=args.num_eval)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
