"""What other platforms lack, kept from a process of this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_pipeline import save_tiny_pipeline


ROOT = Path(__file__).parents[1]

# Imports every module, loads the embedded model, and generates and scores a video.
WITHOUT = """
import builtins, importlib, sys, warnings

ours, load = ("astrolabe_diffusers", "filelock"), builtins.__import__

def load_portable(name, globals=None, *args, **kwargs):
    # Not of other libraries, which know that this is Linux.
    if name in ("fcntl", "resource", "termios", "pwd", "grp") and globals["__name__"].split(".")[0] in ours:
        raise ModuleNotFoundError(name)
    return load(name, globals, *args, **kwargs)

builtins.__import__ = load_portable
warnings.filterwarnings("ignore", "flock not supported")  # filelock's word for a lock file in its place

# As where a library imports diffusers first.
import diffusers, pickle
import astrolabe_diffusers
from tests.test_layers import modules

pipe = diffusers.DiffusionPipeline.from_pretrained(astrolabe_diffusers.TINY_SHAPES)
found = pickle.loads(pickle.dumps(type(pipe)))
assert found is astrolabe_diffusers.CausalWanPipeline is diffusers.CausalWanPipeline

for name in modules():
    importlib.import_module(f"astrolabe_diffusers.{name}")

import torch
from astrolabe_diffusers.generation.config import GenerationConfig
from astrolabe_diffusers.generation.run import generate_videos
from astrolabe_diffusers.reporting.machine import peak_memory_gb

model, out = sys.argv[1:]
size = dict(height=32, width=32, num_frames=9)
generate_videos(GenerationConfig(model=model, prompt="a circle", output_dir=out, rewards={"sharpness": 1.0}, **size))
assert 0.1 < peak_memory_gb(torch.device("cpu")) < 50
"""


def test_it_runs_without_the_modules_of_posix(tmp_path):
    model_folder = save_tiny_pipeline(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WITHOUT, str(model_folder), str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    # No lock is left either.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.jsonl", json.loads(line)["file"]}
