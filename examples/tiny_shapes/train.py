"""Makes the embedded pipeline: `python examples/tiny_shapes/train.py --output_dir DIR`, on one GPU."""

import argparse
import json
import time
from pathlib import Path

import torch
from autoencoder import LATENT_CHANNELS, build_autoencoder, measure_latents, train_autoencoder
from data import write_prompts
from denoiser import Denoiser, build_transformer, distill, encode_clips, solve_trajectories, train_flow_matching
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler
from PIL import Image
from text import MAX_SEQUENCE_LENGTH, CaptionTokens, build_text_encoder, build_tokenizer
from transformers import UMT5EncoderModel

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.training import exit_code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", help="a pipeline folder whose autoencoder is used instead of training one")
    parser.add_argument("--teacher", help="a teacher/ folder of an earlier run: only the distillation is run again")
    parser.add_argument("--autoencoder_steps", type=int, default=4000)
    parser.add_argument("--num_clips", type=int, default=32768)
    parser.add_argument("--flow_steps", type=int, default=8500)
    parser.add_argument("--num_trajectories", type=int, default=16384)
    parser.add_argument("--guidance_scale", type=float, default=0.85, help="of the trajectories that are distilled")
    parser.add_argument("--distill_steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--caption_noise", type=float, default=0.1, help="share of wrong words an attribute")
    parser.add_argument("--switch_prob", type=float, default=0.25, help="share of clips that change scene")
    parser.add_argument("--num_eval", type=int, default=256, help="held-out videos for each figure")
    return parser.parse_args(argv)


@torch.no_grad()
def evaluate(pipe: CausalWanPipeline, prompts: list[str], seed: int, sheet: Path, **kwargs) -> dict:
    """Prompt match over prompts, and a contact sheet of the first 12: a row a prompt, every second frame."""
    generators = [torch.Generator("cpu").manual_seed(seed * 100_003 + i) for i in range(len(prompts))]
    videos = pipe(prompts, generator=generators, output_type="pt", **kwargs).frames.cpu()
    output = get_reward("tiny_shapes_prompt_match").score(videos, prompts, None)
    rows = videos[:12, ::2].permute(0, 3, 1, 4, 2).flatten(2, 3)  # (rows, H, frames * W, 3)
    Image.fromarray((rows.flatten(0, 1).numpy() * 255).round().astype("uint8")).save(sheet)
    return {"prompt_match": output.scores.mean().item()} | {k: v.mean().item() for k, v in output.info.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    if folder := args.autoencoder or args.teacher:
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").to(device).requires_grad_(False)
    else:
        vae = build_autoencoder()
        train_autoencoder(vae, args.num_clips // 4, args.autoencoder_steps, args.batch_size, device, args.seed + 1)
        measure_latents(vae, args.num_clips // 32, device, args.seed + 2)
        vae.save_pretrained(args.output_dir / "vae")

    tokenizer = build_tokenizer()
    if args.teacher:
        text_encoder = UMT5EncoderModel.from_pretrained(args.teacher, subfolder="text_encoder")
        transformer = CausalWanTransformer3DModel.from_pretrained(args.teacher, subfolder="transformer")
    else:
        text_encoder = build_text_encoder(tokenizer)
        transformer = build_transformer(text_encoder.config.d_model, LATENT_CHANNELS)
    model = Denoiser(text_encoder, transformer).to(device).train()
    tokens = CaptionTokens(tokenizer, device)
    pipe = CausalWanPipeline(
        tokenizer,
        model.text_encoder,
        vae,
        FlowMatchLCMScheduler(shift=5.0),
        model.transformer,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        height=64,
        width=64,
        num_frames=21,
        frame_rate=16,
    )
    pipe.to(device).set_progress_bar_config(disable=True)
    write_prompts(args.output_dir / "prompts")
    held_out = (args.output_dir / "prompts" / "test.txt").read_text().splitlines()
    held_out = (held_out * (args.num_eval // len(held_out) + 1))[: args.num_eval]

    bank = encode_clips(vae, args.num_clips, args.caption_noise, args.switch_prob, device, args.seed + 3)
    print(f"encoded {len(bank.latents)} clips, {time.time() - began:.0f} s", flush=True)
    figures = {}

    def report(name: str, **kwargs) -> None:
        figures[name] = evaluate(pipe, held_out, args.seed, args.output_dir / f"{name}.png", **kwargs)
        print(name, {k: round(v, 3) for k, v in figures[name].items()}, f"{time.time() - began:.0f} s", flush=True)

    if not args.teacher:
        train_flow_matching(model, bank, tokens, args.flow_steps, args.batch_size, args.seed + 4)
        pipe.save_pretrained(args.output_dir / "teacher")
    report("teacher_24_steps", sigmas=[1 - i / 24 for i in range(24)])
    report("teacher_4_steps")
    trajectories = solve_trajectories(model, bank, tokens, args.num_trajectories, args.guidance_scale, args.seed + 5)
    print(f"solved {len(trajectories)} trajectories, {time.time() - began:.0f} s", flush=True)
    distill(model, bank, trajectories, tokens, args.distill_steps, args.batch_size, args.seed + 6)
    pipe.save_pretrained(args.output_dir)
    report("student_4_steps")
    report("student_4_steps_93_frames", num_frames=93)

    figures["seconds"] = time.time() - began
    figures["arguments"] = {k: v for k, v in vars(args).items() if k != "output_dir"}
    (args.output_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
