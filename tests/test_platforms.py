"""A fresh process, with less than this one has: no module of POSIX alone and no optional package."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline
from tests.pipelines.test_loading import OVERRIDES, PROMPTS, generate, save_lora
from tests.tiny_pipeline import save_tiny_pipeline, tiny_pipeline


ROOT = Path(__file__).parents[1]

# Generates without and with a LoRA, imports every module, and generates and scores a video.
FRESH_PROCESS = """
import builtins, importlib, sys, warnings

ours, load = ("astrolabe_diffusers", "filelock"), builtins.__import__

def load_portable(name, globals=None, *args, **kwargs):
    # Not of other libraries, which know that this is Linux.
    if name in ("fcntl", "resource", "termios", "pwd", "grp") and globals["__name__"].split(".")[0] in ours:
        raise ModuleNotFoundError(name)
    return load(name, globals, *args, **kwargs)

builtins.__import__ = load_portable
warnings.filterwarnings("ignore", "flock not supported")  # filelock's word for a lock file in its place
# Not installed, as far as this process can tell: none of them is needed to generate.
for name in ("torchvision", "flash_attn", "open_clip"):
    sys.modules[name] = None

import astrolabe_diffusers, importlib.util, pickle
importlib.util.find_spec("diffusers")  # as transformers and peft look whether there is one
import diffusers, torch
from diffusers import DiffusionPipeline

model, lora, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model)
pipe.set_progress_bar_config(disable=True)

def frames():
    generator = torch.Generator().manual_seed(0)
    return pipe(%r, generator=generator, output_type="pt").frames

assert pickle.loads(pickle.dumps(type(pipe))) is astrolabe_diffusers.CausalWanPipeline is diffusers.CausalWanPipeline
result = {"class": type(pipe).__name__, "plain": frames()}
pipe.load_lora_weights(lora)
result["lora"] = frames()
torch.save(result, out + "/out.pt")

from tests.test_layers import modules

kernels = {f"models.{kind}_kernels" for kind in ("attention", "block", "vae")}  # imported where there is Triton
for name in modules().keys() - kernels:
    importlib.import_module(f"astrolabe_diffusers.{name}")

from astrolabe_diffusers.generation.config import GenerationConfig
from astrolabe_diffusers.generation.run import generate_videos
from astrolabe_diffusers.reporting.machine import peak_memory_gb

size = dict(height=32, width=32, num_frames=9)
out += "/videos"
generate_videos(GenerationConfig(model=model, prompt="a circle", output_dir=out, rewards={"sharpness": 1.0}, **size))
assert 0.1 < peak_memory_gb(torch.device("cpu")) < 50
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """The folder that the process has written into, and the frames of its LoRA as they are in this process."""
    folder = tmp_path_factory.mktemp("fresh")
    lora_frames = save_lora(folder / "lora")
    model_folder = save_tiny_pipeline(folder / "model", **OVERRIDES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", FRESH_PROCESS % PROMPTS, str(model_folder), str(folder / "lora"), str(folder)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, lora_frames


def test_it_generates_as_this_process_does(fresh_process, diffusers_norm):
    folder, lora_frames = fresh_process
    result = torch.load(folder / "out.pt")
    assert result["class"] == "CausalWanPipeline"
    assert torch.equal(result["plain"], generate(tiny_pipeline(**OVERRIDES)))
    assert (result["lora"] - lora_frames).abs().max() <= 1e-5
    assert (result["lora"] - result["plain"]).abs().max() > 1e-2


def test_it_runs_without_the_modules_of_posix(fresh_process):
    folder = fresh_process[0] / "videos"
    (line,) = (folder / "manifest.jsonl").read_text().splitlines()
    # No lock is left either.
    assert {path.name for path in folder.iterdir()} == {"manifest.jsonl", json.loads(line)["file"]}


def test_diffusers_imported_first_has_the_classes_too():
    """As in this process, by tests/conftest.py; and as where a library imports it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(TINY_SHAPES)
    found = pickle.loads(pickle.dumps(type(pipe)))
    assert found is CausalWanPipeline is diffusers.CausalWanPipeline
