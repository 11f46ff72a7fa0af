"""Measures the embedded pipeline on held-out captions and draws contact sheets of it:

    python examples/tiny_shapes/figures.py --output_dir figures [--model FOLDER] [--split validation]

`figures.json` has the match with the captions, with its parts, by number of objects; block by block after a switch to
another scene and after one that adds an object; and over a minute of stream. The sheets have a row a video.
"""

import argparse
import json
from pathlib import Path

import torch
from data import Draws, captions, draw_scenes, held_out
from diffusers import DiffusionPipeline
from PIL import Image

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import exit_code
from astrolabe_diffusers.rewards import get_reward


KINDS = {"one_object": "one_object", "two_objects": "two_objects", "three_objects": "."}
# Blocks before a switch and after it; of a minute of 16 frames a second, and of ten seconds.
BEFORE, AFTER, MINUTE, TEN_SECONDS = 3, 6, 80, 13
BATCH = 32


def match(videos: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    output = get_reward("tiny_shapes_prompt_match").score(videos, prompts)
    return {"match": output.scores.mean().item()} | {name: part.mean().item() for name, part in output.info.items()}


def generators(number: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(number)]


def generate(pipe: CausalWanPipeline, prompts: list[str], seed: int, **kwargs) -> torch.Tensor:
    """Videos [N, F, 3, H, W] in [0, 1], the same whatever the batch."""
    noise = generators(len(prompts), seed)
    parts = [
        pipe(prompts[i : i + BATCH], generator=noise[i : i + BATCH], output_type="pt", **kwargs).frames.float().cpu()
        for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat(parts)


def follow(pipe: CausalWanPipeline, old: list[str], new: list[str], transition: str, seed: int) -> torch.Tensor:
    """Videos [N, BEFORE + AFTER, F, 3, H, W] whose prompts change after BEFORE blocks, without the first block's
    frames, of which there are fewer, being dropped: it is padded with its first frame."""
    noise, videos = generators(len(old), seed), []
    for i in range(0, len(old), BATCH):
        part, count = slice(i, i + BATCH), 12 * (BEFORE + AFTER) - 3
        stream, blocks = pipe.stream(old[part], num_frames=count, generator=noise[part], output_type="pt"), []
        for block in range(BEFORE + AFTER):
            if block == BEFORE:
                stream.set_prompt(new[part], transition=transition)
            frames = next(stream).float().cpu()
            blocks.append(torch.cat([frames[:, :1].expand(-1, 12 - frames.shape[1], -1, -1, -1), frames], dim=1))
        videos.append(torch.stack(blocks, dim=1))
    return torch.cat(videos)


def by_block(videos: torch.Tensor, old: list[str], new: list[str]) -> dict[str, list[float]]:
    """Match with the new prompt in each block after the switch, half its 95 % interval, match with the old prompt, and
    the share of blocks in which no object of either is found."""
    reward, result = get_reward("tiny_shapes_prompt_match"), {"new": [], "interval": [], "old": [], "empty": []}
    for block in videos[:, BEFORE:].unbind(1):
        outputs = {"new": reward.score(block, new), "old": reward.score(block, old)}
        for name, output in outputs.items():
            result[name].append(output.scores.mean().item())
        result["interval"].append(1.96 * outputs["new"].scores.std().item() / len(block) ** 0.5)
        seen = torch.maximum(*(output.info["color"] for output in outputs.values()))
        result["empty"].append((seen < 0.1).float().mean().item())
    return result


def minute(pipe: CausalWanPipeline, prompts: list[str], seed: int) -> list[float]:
    """Mean match in each ten seconds of a stream of a minute."""
    arguments = {"num_frames": 12 * MINUTE - 3, "generator": generators(len(prompts), seed), "output_type": "pt"}
    reward = get_reward("tiny_shapes_prompt_match")
    scores = [reward.score(f.float().cpu(), prompts).scores.mean() for f in pipe.stream(prompts, **arguments)]
    return [part.mean().item() for part in torch.stack(scores).split(TEN_SECONDS)]


def sheet(videos: torch.Tensor, path: Path, every: int = 4) -> None:
    """A row a video, of each `every`th frame."""
    rows = videos[:, ::every].permute(0, 3, 1, 4, 2).flatten(2, 3)  # (rows, H, frames * W, 3)
    Image.fromarray((rows.flatten(0, 1).numpy() * 255).round().astype("uint8")).save(path)


def switches(number: int, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Pairs of held-out captions, of one and two objects: unrelated ones, and those with one object more."""
    draws = Draws(torch.Generator().manual_seed(seed), "cpu")
    scenes = [draw_scenes(24 * number, draws, 1 + draws.below(2, 24 * number)) for _ in range(2)]
    old, new = (captions(s[held_out(s)][:number]) for s in scenes)
    more = draw_scenes(24 * number, draws, 2 + draws.below(2, 24 * number))
    count = (more[:, :-1:3] >= 0).sum(1, keepdim=True)
    columns = torch.arange(more.shape[1])
    fewer = more.masked_fill((columns // 3 == count - 1) & (columns < more.shape[1] - 1), -1)
    return {
        "scene": (old, new),
        "added": (captions(fewer[held_out(more)][:number]), captions(more[held_out(more)][:number])),
    }


def write_figures(output: Path, model: str | Path, split: str = "test", number: int = 128, seed: int = 0) -> dict:
    """Writes `figures.json` and the sheets into `output`, for `number` videos each figure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    output.mkdir(parents=True, exist_ok=True)
    figures, shown, texts = {"split": split, "videos": number}, [], []
    for kind, folder in KINDS.items():
        unseen = (Path(model) / "prompts" / folder / f"{split}.txt").read_text().splitlines()
        prompts = (unseen * (number // len(unseen) + 1))[:number]
        figures[kind] = match(videos := generate(pipe, prompts, seed), prompts)
        print(kind, {name: round(value, 3) for name, value in figures[kind].items()}, flush=True)
        shown.append(videos[:8])
        texts += prompts[:8]
    mixed = [p for i in range(8) for p in texts[i::8]]
    sheet(torch.cat(shown), output / "held_out.png", every=2)

    for kind, (old, new) in switches(number, seed).items():
        for transition in pipe.transitions:
            videos = follow(pipe, old, new, transition, seed)
            figures[f"{kind}_{transition}"] = (blocks := by_block(videos, old, new))
            print(
                kind, transition, {name: [round(v, 2) for v in values] for name, values in blocks.items()}, flush=True
            )
            if transition == "roll":
                sheet(videos[:12].flatten(1, 2), output / f"{kind}_roll.png", every=6)
                texts += [f"{a} | {b}" for a, b in zip(old[:12], new[:12])]
    figures["minute"] = minute(pipe, mixed, seed)
    print("minute", [round(value, 3) for value in figures["minute"]], flush=True)
    (output / "sheets.txt").write_text("\n".join(texts) + "\n")
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", default=TINY_SHAPES, help="a pipeline folder with its prompts")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--number", type=int, default=128, help="videos for each figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_figures(args.output_dir, args.model, args.split, args.number, args.seed)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
