"""Speed and memory of HPSv3 and VideoAlign on this machine, beside the published way of scoring.

Weights are random, at full size, in files of the published layout, which the rewards load as they load the real ones.
The published way is written out below: every frame as a Pillow picture through numpy, four at a time, padded and
masked, the head on every token; and for VideoAlign a model of its own for each score.
"""

import argparse
import copy
import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from measuring import clock, forget_peak, gpu_peak
from PIL import Image
from random_models import random_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import exit_code
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rewards.frames import prepare_frames, to_uint8, top_fraction_mean
from astrolabe_diffusers.rewards.models.hpsv3 import HPSv3
from astrolabe_diffusers.rewards.models.model_reward import CLIP_MEAN, CLIP_STD


# Qwen2-VL's three sizes of interest: language model, then vision.
SIZES = {
    "7B": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4), dict(hidden_size=3584), 151643),
    "2B": (dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2), dict(hidden_size=1536), 151643),
    "tiny": (dict(hidden_size=128, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
                  num_key_value_heads=1), dict(hidden_size=128, depth=1, embed_dim=32, num_heads=2), 300),
}  # fmt: skip
SPECIAL = ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
           "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")  # fmt: skip
PROMPT = "a boat on a lake"
# In the place of the published texts, with as many tokens, one a letter here.
HPSV3_TEXT = f"INSTRUCTION = '{'x' * 560}{{text_prompt}}'\nprompt_with_special_token = '<|Reward|> END'\n"
VIDEOALIGN_TEXT = (
    f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '{'x' * 300}<|VQ_reward|>{'x' * 310}<|MQ_reward|>{'x' * 250}"
    "{text_prompt}<|TA_reward|>END'\n"
)


def write_base(folder: Path, size: str, num_reward_tokens: int) -> Qwen2VLConfig:
    """Configuration and tokenizer of the base model, whose vocabulary has rows for reward tokens."""
    language, vision, words = SIZES[size]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(alphabet + [f"unused{i}" for i in range(words - len(alphabet))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(rope_parameters=rope, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None)
    ids = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = Qwen2VLConfig(
        text_config={**language, **text, "vocab_size": len(tokenizer) + num_reward_tokens},
        vision_config=vision,
        **{f"{field}_token_id": words + SPECIAL.index(name) for field, name in ids.items()},
    )
    config.save_pretrained(folder)
    return config


def random_tensors(config: Qwen2VLConfig, head: torch.nn.Module, device: str) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights on the CPU, named as transformers 4 did, the head as `rm_head`."""
    with init_empty_weights():
        model = Qwen2VLForConditionalGeneration(config)
    model.rm_head = head
    tensors = random_weights(model, device, torch.bfloat16).state_dict()
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.cpu()
        for name, tensor in tensors.items()
    }


def write_hpsv3(folder: Path, size: str, device: str):
    config = write_base(folder / "base", size, 1)
    head = torch.nn.Sequential(
        torch.nn.Linear(config.text_config.hidden_size, 1024), torch.nn.ReLU(), torch.nn.Dropout(),
        torch.nn.Linear(1024, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2),
    )  # fmt: skip
    (folder / "data_collator_qwen.py").write_text(HPSV3_TEXT)
    safetensors.torch.save_file(random_tensors(config, head, device), folder / "HPSv3.safetensors")


def write_videoalign(folder: Path, size: str, device: str):
    """Full weights and a LoRA, wrapped by PEFT."""
    config = write_base(folder / "base", size, 3)
    head = torch.nn.Linear(config.text_config.hidden_size, 1, bias=False)
    (folder / "prompt_template.py").write_text(VIDEOALIGN_TEXT)
    norms = {f"{name}_{what}": value for name in ("VQ", "MQ", "TA") for what, value in (("mean", 0), ("std", 1))}
    settings = {"inference_config": norms, "peft_lora_config": {"lora_r": 64, "lora_alpha": 128}}
    (folder / "model_config.json").write_text(json.dumps(settings))
    wrapped = {}
    for name, tensor in random_tensors(config, head, device).items():
        module, _, leaf = name.rpartition(".")
        adapted = name.startswith("model.layers.") and "norm" not in name
        wrapped[f"base_model.model.{module}{'.base_layer' if adapted else ''}.{leaf}"] = tensor
        if adapted and leaf == "weight":
            for part, shape in (("A", (64, tensor.shape[1])), ("B", (tensor.shape[0], 64))):
                small = torch.randn(shape, dtype=torch.bfloat16) * 0.01
                wrapped[f"base_model.model.{module}.lora_{part}.default.weight"] = small
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    torch.save(wrapped, folder / "checkpoint-1" / "model.pth")


# The published way


def masked_batch(prompt, text: str, pads: int, copies: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids, mask and positions of a text to its very end, the picture's pad repeated."""
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    whole = before + prompt.pad * pads + "<|vision_end|>" + text + "<|im_end|>\n<|im_start|>assistant\n"
    batch = prompt.tokenizer([whole] * copies, padding=True, return_tensors="pt").to(device)
    length = batch["input_ids"].shape[1]
    positions = torch.arange(length, device=device).expand(3, copies, length)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}


def head_everywhere(model, token_ids: list[int], **inputs) -> torch.Tensor:
    """[N, K] of the head's first output, computed for every token, at the K reward tokens."""
    hidden = model.backbone(use_cache=False, **inputs).last_hidden_state
    logits = model.head(hidden.float())[..., 0]
    return logits[torch.isin(inputs["input_ids"], torch.tensor(token_ids, device=logits.device))].view(len(hidden), -1)


def published_hpsv3(reward: HPSv3, videos: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    processor, scores = Qwen2VLImageProcessorPil(), []
    height, width = reward.frame_size(*videos.shape[-2:])
    with torch.no_grad():
        for video, prompt in zip(to_uint8(videos), prompts):
            pictures = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in video]
            text = reward.prompt.template.replace("{text_prompt}", prompt)
            values = []
            for start in range(0, len(pictures), 4):
                part = [picture.resize((width, height)) for picture in pictures[start : start + 4]]
                inputs = processor(part, return_tensors="pt").to(reward.device)
                batch = masked_batch(reward.prompt, text, height * width // 28**2, len(part), reward.device)
                values += head_everywhere(reward.model, reward.prompt.token_ids, **batch, **inputs)[:, 0].tolist()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            scores.append(values)
    return top_fraction_mean(torch.tensor(scores), reward.top_fraction)


def published_videoalign(rewards: list, models: list, videos: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """[B, scores], each from a model of its own."""
    columns = []
    with torch.no_grad():
        for reward, model in zip(rewards, models):
            prompt, device = reward.video_reward.prompt, next(model.parameters()).device
            request = reward.request(videos.shape[1], *videos.shape[-2:])
            frames = prepare_frames(videos.cpu(), request).numpy()
            if request.gray:
                frames = np.repeat(frames, 3, axis=2)
            patches = [numpy_patches(video) for video in frames]
            grid = torch.tensor([[frames.shape[1] // 2, frames.shape[3] // 14, frames.shape[4] // 14]] * len(frames))
            text = prompt.template.replace("{text_prompt}", prompts[0])
            inputs = masked_batch(prompt, text, int(grid[0].prod()) // 4, len(frames), device)
            inputs["pixel_values_videos"] = torch.tensor(np.concatenate(patches)).to(device)
            values = head_everywhere(model, prompt.token_ids, **inputs, video_grid_thw=grid.to(device))
            columns.append(values[:, ("VQ", "MQ", "TA").index(reward.dimensions[0])].float().cpu())
    return torch.stack(columns, 1)


def numpy_patches(frames: np.ndarray) -> np.ndarray:
    mean, std = (np.float32(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (frames.astype(np.float32) / 255 - mean) / std
    length, channels, height, width = pixels.shape
    pixels = pixels.reshape(length // 2, 2, channels, height // 28, 2, 14, width // 28, 2, 14)
    return pixels.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * 2 * 14 * 14)


# Measuring


@dataclass
class Row:
    what: str
    clips_per_second: float
    gigabytes: float  # peak on the GPU, weights and videos included
    scores: torch.Tensor


def measure(what: str, score: Callable[[torch.Tensor], torch.Tensor], videos: torch.Tensor, repetitions: int) -> Row:
    score(videos[:1])  # compiles kernels
    forget_peak()
    seconds = []
    for i in range(repetitions):
        # Another batch each time: rewards may remember the last.
        batch = videos.roll(i + 1, dims=1)
        started = clock()
        scores = score(batch)
        seconds.append(clock() - started)
    return Row(what, len(videos) / min(seconds), gpu_peak(), scores)


def table(rows: list[Row]) -> list[str]:
    """A table whose first row is what the others are compared with: speed, and scores of the clips both have."""
    lines = ["| | clips/s | times published | peak GB | scores differ by at most | of a spread of |"]
    lines.append("|---|---|---|---|---|---|")
    first = rows[0]
    for row in rows:
        both = min(len(first.scores), len(row.scores))
        difference = (row.scores[:both] - first.scores[:both]).abs().max().item()
        lines.append(
            f"| {row.what} | {row.clips_per_second:.3f} | {row.clips_per_second / first.clips_per_second:.2f} | "
            f"{row.gigabytes:.1f} | {difference:.2g} | {rows[-1].scores.std(0).max().item():.2g} |"
        )
    return lines


def benchmark_hpsv3(rewards: list[HPSv3], args: argparse.Namespace, videos: torch.Tensor) -> list[Row]:
    (reward,), prompts = rewards, [PROMPT] * len(videos)
    strided = copy.copy(reward)
    strided.select = type(reward.select)("stride:4", 16)
    few = videos[: args.published_clips]
    ways = {
        "published way": (lambda v: published_hpsv3(reward, v, prompts), few),
        "every fourth frame": (lambda v: strided.score(v, prompts[: len(v)]).scores, videos),
        # Last: the spread is that of every frame.
        f"every frame, {reward.batch_size} at a time": (lambda v: reward.score(v, prompts[: len(v)]).scores, videos),
    }
    rows = [measure(f"HPSv3, {what}", score, clips, args.repetitions) for what, (score, clips) in ways.items()]
    if args.compile:
        reward.model.compile_layers()
        what, (score, clips) = ways.popitem()
        rows.append(measure(f"HPSv3, {what}, compiled", score, clips, args.repetitions))
    return rows


def benchmark_videoalign(rewards: list, args: argparse.Namespace, videos: torch.Tensor) -> list[Row]:
    prompts, what = [PROMPT] * len(videos), "VideoAlign VQ, MQ in gray and TA"

    def ours(batch):
        return torch.stack([reward.score(batch, prompts[: len(batch)]).scores for reward in rewards], 1)

    row = measure(f"{what}, one model", ours, videos, args.repetitions)
    models = [rewards[0].model] + [copy.deepcopy(rewards[0].model) for _ in rewards[1:]]
    published = functools.partial(published_videoalign, rewards, models, prompts=prompts)
    return [measure(f"{what}, published way", published, videos[: args.published_clips], args.repetitions), row]


VIDEOALIGN = [f"videoalign_{part}_score" for part in ("vq", "mq", "ta")]
# Of each, what writes its files at which size, its rewards, and what measures them.
BENCHMARKS = {
    "hpsv3": (write_hpsv3, "7B", ["video_hpsv3_local"], benchmark_hpsv3),
    "videoalign": (write_videoalign, "2B", VIDEOALIGN, benchmark_videoalign),
}


def run(name: str, folder: Path, args: argparse.Namespace, videos: torch.Tensor) -> list[str]:
    write, size, names, benchmark = BENCHMARKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole"
    if not whole.exists():
        write(folder, "tiny" if args.tiny else size, args.device)
        whole.touch()
    options = {"checkpoint": str(folder), "base": str(folder / "base"), "device": args.device}
    if name == "hpsv3":
        options["batch_size"] = args.batch_size
    started = clock()
    rewards = [get_reward(reward, **options) for reward in names]
    print(f"{name}: loaded in {clock() - started:.1f} s", flush=True)
    return table(benchmark(rewards, args, videos))


def main(argv: list[str] | None = None) -> list[str]:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=8, help="clips in a batch")
    parser.add_argument("--published_clips", type=int, default=2, help="clips that are scored in the published way")
    parser.add_argument("--num_frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--batch_size", type=int, default=16, help="frames in a pass of HPSv3")
    parser.add_argument("--compile", action="store_true", help="a row more, of HPSv3 with compiled layers")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="models of a few layers' width, to try the script")
    parser.add_argument("--scratch", help="folder that keeps the random weights, 17 and 5 GB, for the next time")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    size, small = (args.height, args.width), torch.rand(args.clips, args.num_frames, 3, 6, 10, device=args.device)
    videos = torch.stack([F.interpolate(clip, size, mode="bicubic").clamp(0, 1) for clip in small])
    lines = []
    for name in args.rewards:
        with nullcontext(args.scratch) if args.scratch else tempfile.TemporaryDirectory() as scratch:
            lines += run(name, Path(scratch) / name, args, videos) + [""]
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
