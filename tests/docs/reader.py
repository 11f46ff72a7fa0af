"""A reader who does what a page says, on models that a CPU can train.

Python runs as it stands, commands of ours run in this process; what makes them short is added to them. What needs
several GPUs, the Hub or minutes is read by the parser that would read it, and the files it names have to be there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub.cli.hf import app as hub_client
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser as torchrun_parser

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.cli.main import main as astrolabe
from astrolabe_diffusers.files.video import VideoWriter
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS, find_published_model
from astrolabe_diffusers.live.config import LiveConfig
from astrolabe_diffusers.live.load import load_model
from astrolabe_diffusers.live.session import LiveSession
from astrolabe_diffusers.training.config import OnlineConfig
from tests.conftest import skip_charts
from tests.layouts.original_layout import original_names, original_weights
from tests.layouts.test_experts import two_experts
from tests.tiny_decoder_files import tiny_decoder_tensors
from tests.tiny_pipeline import save_tiny_pipeline, tiny_pipeline, tiny_shapes_captions, tiny_transformer

from .pages import ROOT, Command, blocks, commands, read_page


# Settings of every run.
SHORT = {
    "train_batch_size": 2,
    "batches_per_epoch": 1,
    "samples_per_prompt": 2,
    "trained_fraction": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "num_eval_prompts": 1,
    "eval_seeds": 1,
    "eval_num_frames": 9,
    "num_eval_videos": 0,
    "rank": 2,
    "mixed_precision": "no",
    "report_to": "none",
}
QUICK_START = ["--config", "tiny_shapes"]
# What is added to other commands, or goes in place of what they say.
CUT = {
    "train": {},
    "generate": {"num_videos_per_prompt": 1},
    "evaluate": {"num_prompts": 1, "seeds": 1, "num_videos": 1, "num_frames": 9},
    "convert": {},
    "score": {},
}
SCRIPTS = {
    "examples/train_nft.py": "train",
    "examples/generate.py": "generate",
    "examples/evaluate.py": "evaluate",
    "examples/score.py": "score",
    "examples/serve_reward.py": "serve",
    "examples/live.py": "live",
    "examples/convert_checkpoint.py": "convert",
}
# What each command calls once its arguments are read and its settings made.
WORK = {
    "train": "cli.train.get_algorithm",
    "generate": "generation.run.generate_videos",
    "evaluate": "evaluation.loras.evaluate_loras",
    "score": "evaluation.score_files.score_videos",
    "serve": "cli.serve.serve",
    "live": "cli.live.serve",
    "convert": "cli.convert.convert",
}
# What a reader has set, for $NAME.
VARIABLES = {"RANK": "1", "ADDRESS_OF_RANK_0": "10.0.0.1", "MASTER_ADDR": "10.0.0.1"}
PACKAGES = {"hpsv3", "brisque"}


class Reader:
    """Follows pages in a folder, which is the current one and on the path, with the checkout's files in it."""

    def __init__(self, folder: Path, quick_start: Path | None, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.namespace: dict = {}
        for name in ("examples", "accelerate_configs", "tests", "constraints.txt"):
            (folder / name).symlink_to(ROOT / name)
        torch.save(tiny_decoder_tensors(), folder / "taew2_1.pth")
        (folder / "my-prompts.txt").write_text("\n".join(tiny_shapes_captions()[:6]))
        if quick_start:
            shutil.copytree(quick_start, folder / "nft-tiny-shapes")
        self.modules: list[str] = []
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        # The quick start's and those of tests/reporting are drawn.
        skip_charts(monkeypatch)

    def follow(self, page: str) -> Reader:
        for block in blocks(read_page(page), page):
            try:
                LANGUAGES[block.language](self, block)
            except BaseException as error:
                error.add_note(f"at {block.place}")
                raise
        return self

    # Blocks

    def follow_text(self, block):
        """Output, and what others' commands are: shown, not followed."""

    def follow_yaml(self, block):
        (self.folder / re.match(r"# (\S+)\n", block.text)[1]).write_text(block.text)

    def follow_python(self, block):
        if name := re.match(r"# (\S+\.py)\n", block.text):
            (self.folder / name[1]).write_text(block.text)
            self.modules.append(name[1].removesuffix(".py"))
            importlib.invalidate_caches()
        else:
            code = block.text.replace('"cuda"', '"cpu"')
            for model in re.findall(r'from_pretrained\("([\w.-]+)"', code):
                if model in PUBLISHED_MODELS and not (self.folder / model).exists():
                    save_tiny_pipeline(self.folder / model)
            compiled = compile(code, block.place, "exec")
            if "torchao" in code and importlib.util.find_spec("torchao") is None:  # an extra
                return
            with short_runs(num_eval_prompts=2):  # where a snippet gives as many, all of them count
                exec(compiled, self.namespace)

    def follow_bash(self, block):
        for command in commands(block.text):
            PROGRAMS[command.words[0]](self, command)

    # Commands of others

    def run_venv(self, command):
        assert command.words in (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"])

    def run_pip(self, command):
        words = iter(command.words[1:])
        assert next(words) == "install"
        for word in words:
            if word == "-c":
                assert (ROOT / next(words)).is_file()
            elif extra := re.fullmatch(r"\.\[(\w+)\]", word):
                assert f'"{extra[1]}":' in (ROOT / "setup.py").read_text()
            else:
                assert word in {"-q", "--no-deps", ".", *PACKAGES}

    def run_pytest(self, command):
        assert (ROOT / command.words[1]).is_dir()
        assert "-n" not in command.words or "pytest-xdist" in (ROOT / "setup.py").read_text()

    def run_printf(self, command):
        text = subprocess.run(command.words, capture_output=True, text=True, check=True).stdout
        (self.folder / command.output).write_text(text)

    def run_hf(self, command):
        """It understands the command, and then has no network."""
        with pytest.raises(LocalEntryNotFoundError):
            hub_client(command.words[1:], standalone_mode=False)

    # Commands of ours

    def run_accelerate(self, command):
        words = [VARIABLES[word[1:]] if word.startswith("$") else word for word in command.words]
        assert words[1] == "launch"
        launch = launch_command_parser().parse_args(words[2:])
        num_processes = launch.num_processes
        if launch.config_file:
            num_processes = num_processes or load_config_from_file(launch.config_file).num_processes
        self.run_script(launch.training_script, launch.training_script_args, num_processes, command)

    def run_torchrun(self, command):
        launch = torchrun_parser().parse_args(command.words[1:])
        num_processes = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0])
        self.run_script(launch.training_script, launch.training_script_args, num_processes, command)

    def run_python(self, command):
        if command.words[1] == "-c":  # has the current folder on its path, unlike a script in another
            exec(command.words[2], {})
        else:
            self.run_script(command.words[1], command.words[2:], 1, command)

    def run_script(self, path: str, argv: list[str], num_processes: int, command: Command):
        assert (ROOT / path).is_file(), path
        if path in SCRIPTS:
            self.run(SCRIPTS[path], argv, num_processes, command)
        else:  # measures full size, or trains for minutes
            spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
            script = importlib.util.module_from_spec(spec)
            with self.monkeypatch.context() as patch:
                patch.syspath_prepend(str((ROOT / path).parent))
                patch.setitem(sys.modules, spec.name, script)
                spec.loader.exec_module(script)
                read = ArgumentParser.parse_args

                def parse_args(parser, argv=None):
                    read(parser, argv)
                    raise Stopped

                patch.setattr(ArgumentParser, "parse_args", parse_args)
                with pytest.raises(Stopped):
                    script.main(argv)

    def run_astrolabe(self, command):
        self.run(command.words[1], command.words[2:], 1, command)

    def run(self, name: str, argv: list[str], num_processes: int, command: Command):
        if any(re.search(rf"\b{module}\b", word) for module in self.modules for word in argv):
            assert command.environment.get("PYTHONPATH") == ".", "the page's module is not on the path"
        if name == "train" and argv == QUICK_START:
            return
        if name in ("serve", "live") or num_processes > 1 or self.needs_more(name, argv):
            with self.monkeypatch.context() as patch:
                patch.setenv("WORLD_SIZE", str(num_processes))
                stop_at(f"astrolabe_diffusers.{WORK[name]}", astrolabe, [name, *argv])
            return
        if session := value_of(argv, "--session"):
            self.write_session(Path(session), value_of(argv, "--lora"))
        if name == "convert":
            self.write_published(argv)
            argv = ["tiny-base" if word.startswith("Wan-AI/") else word for word in argv]
        if name == "train" and (config := Path(value_of(argv, "--config") or "")).suffix == ".yaml":
            save_tiny_pipeline(yaml.safe_load(config.read_text())["model"])
        if name == "score":
            (self.folder / argv[0]).mkdir()
            with VideoWriter(self.folder / argv[0] / "a.mp4", 32, 48, 16) as writer:
                writer.write(np.full((5, 32, 48, 3), 51, np.uint8))
        # From one prompt to another.
        switches = "--transitions" in argv or "switch" in (value_of(argv, "--config") or "")
        values = CUT[name] | ({"num_prompts": 2, "num_frames": 21} if switches and name == "evaluate" else {})
        with short_runs(**({"num_eval_prompts": 2, "eval_num_frames": 21} if switches else {})):
            assert astrolabe([name, *cut(argv, values)]) == 0
        if name == "convert" and "--recipe" in argv:  # a model of this size makes a video of its own in no time
            path = Path(value_of(argv, "--output_dir"), "model_index.json")
            sizes = {"height": 32, "width": 32, "num_frames": 9}
            path.write_text(json.dumps(json.loads(path.read_text()) | sizes))

    def needs_more(self, name: str, argv: list[str]) -> bool:
        """Whether a command wants a published model, which are tiny here, or a server that is not there."""
        published = value_of(argv, "--model") in PUBLISHED_MODELS and name != "convert"
        return published or any("http://" in word for word in argv)

    def write_session(self, path: Path, lora: str):
        """What the page saves: two blocks."""
        model = load_model(LiveConfig(lora={lora: 1.0}), None, None)
        session = LiveSession(model, "a red circle moves left on a black background", seed=0)
        for _ in range(2):
            session.make_block()
        session.close()
        path.write_text(json.dumps(session.record()))

    def write_published(self, argv: list[str]):
        """The files that a conversion reads, in their published layout."""
        pipe = tiny_pipeline(max_sequence_length=512)
        if checkpoint := value_of(argv, "--checkpoint"):
            model = find_published_model(value_of(argv, "--recipe"))
            assert Path(checkpoint).name in model.source
            names = "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim"
            names = f"{names} ffn_dim num_layers rope_max_seq_len".split()
            stock = WanTransformer3DModel(**{name: pipe.transformer.config[name] for name in names})
            base = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, stock)
            base.save_pretrained("tiny-base")
            weights = original_weights(pipe.transformer)
            if "Forcing_Plus" in model.source:
                weights = two_experts(pipe.transformer, tiny_transformer(seed=1))
            if model.weights:
                weights = {model.weights[0]: {f"model.{name}": tensor for name, tensor in weights.items()}}
            save(weights, Path(checkpoint))
        if lora := value_of(argv, "--lora"):
            pairs = {}
            for original in original_names(pipe.transformer.config.num_layers):
                tensor = original_weights(pipe.transformer)[original]
                if original.startswith("blocks.") and original.endswith("weight") and tensor.ndim == 2:
                    module = original.removesuffix(".weight")
                    pairs[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, tensor.shape[1])
                    pairs[f"base_model.model.{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 4)
            save({"generator_lora": pairs}, Path(lora))


# What is in none of these fails: no test follows it.
LANGUAGES = {
    "bash": Reader.follow_bash,
    "python": Reader.follow_python,
    "yaml": Reader.follow_yaml,
    "text": Reader.follow_text,
    "bibtex": Reader.follow_text,
}
PROGRAMS = {
    "python3": Reader.run_venv,
    ".": Reader.run_venv,
    "pip": Reader.run_pip,
    "pytest": Reader.run_pytest,
    "printf": Reader.run_printf,
    "hf": Reader.run_hf,
    "accelerate": Reader.run_accelerate,
    "torchrun": Reader.run_torchrun,
    "python": Reader.run_python,
    "astrolabe": Reader.run_astrolabe,
}


def save(weights: dict, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)


def value_of(argv: list[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def cut(argv: list[str], values: dict) -> list[str]:
    """The arguments with these values in place of their own or added to them."""
    for name in values:
        while f"--{name}" in argv:
            at = argv.index(f"--{name}")
            argv = argv[:at] + argv[at + 2 :]
    return [*argv, *(str(word) for name, value in values.items() for word in (f"--{name}", value))]


@contextmanager
def short_runs(**values):
    """Runs that are started inside are short, whatever their settings say."""
    check = OnlineConfig.__post_init__

    def shorten(self):
        check(copy(self))  # as they are on the page
        for name, value in (SHORT | values).items():
            setattr(self, name, value)
        check(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineConfig, "__post_init__", shorten)
        yield


class Stopped(BaseException):
    """A command came as far as it should."""


def stop_at(target: str, main: Callable, argv: list[str]):
    """Calls `main`, which is to come as far as calling `target`."""

    def stop(*args, **kwargs):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(target, stop)
        main(argv)
