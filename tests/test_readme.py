"""README.md followed to the letter, on models that a CPU can train; what makes a run short is added to its command."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline
from astrolabe_diffusers.registration import register_with_diffusers
from astrolabe_diffusers.training import NFTConfig
from astrolabe_diffusers.training.adapter_files import save_adapter
from astrolabe_diffusers.training.run_folder import open_training_folder
from tests.layouts.original_layout import original_weights
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import TEXT_DIM, save_tiny_pipeline, tiny_pipeline, tiny_shapes_captions


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = {
    "height": 32,
    "width": 32,
    "num_frames": 21,
    "train_batch_size": 4,
    "batches_per_epoch": 1,
    "samples_per_prompt": 4,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "num_eval_prompts": 2,
    "eval_seeds": 1,
    "num_eval_videos": 1,
    "rank": 2,
    "mixed_precision": "no",
    "report_to": "none",
}


def section(heading):
    """The text under a heading, up to the next one of the same level or higher."""
    level = heading.split()[0]
    start = README.index(f"\n{heading}\n") + len(heading) + 2
    following = re.search(rf"^#{{2,{len(level)}}} ", README[start:], re.M)
    return README[start : start + following.start()]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    return [shlex.split(line) for block in blocks(text, "bash") for line in block.splitlines()]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as the current one and on the path, the examples at hand, and a prompt file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "my-prompts.txt").write_text("\n".join(tiny_shapes_captions()[:6]))
    yield tmp_path
    for name in ("my_model", "my_pipeline", "my_rewards"):
        sys.modules.pop(name, None)


def save_files(text, folder):
    """Writes the code blocks that begin with the name of a file."""
    for block in blocks(text, "python") + blocks(text, "yaml"):
        name = re.match(r"# (\S+)\n", block)[1]
        (folder / name).write_text(block)


def train(command, **values):
    """Runs `accelerate launch ... examples/train_nft.py ...` in this process, with `SHORT` and `values`."""
    from train_nft import main

    assert main(replaced(command[command.index("examples/train_nft.py") + 1 :], SHORT | values)) == 0


def replaced(arguments, values):
    """The arguments of a command, `--name value` each, with these values in place of its own or added to them."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {f"--{name}": v for name, v in values.items()}
    return [str(part) for pair in given.items() for part in pair]


@pytest.mark.parametrize("heading", ["A checkpoint", "A transformer", "A pipeline with its own block loop"])
def test_sections_are_short(heading):
    lines = [line for line in section(f"### {heading}").splitlines() if line and not line.startswith("```")]
    assert len(lines) <= 15
    assert all(
        (ROOT / path).is_file() for path in re.findall(r"accelerate_configs/\S+|examples/\w+\.py", "".join(lines))
    )


def test_checkpoint(workplace):
    """From a checkpoint as published, through the folder that the README's command converts it to, to a LoRA."""
    import convert_checkpoint

    pipe = tiny_pipeline(max_sequence_length=512)
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    names += ("freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len")
    stock = WanTransformer3DModel(**{name: pipe.transformer.config[name] for name in names})
    WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, stock).save_pretrained("base")
    weights = {f"model.{name}": tensor for name, tensor in original_weights(pipe.transformer).items()}
    torch.save({"generator_ema": weights}, "self_forcing_dmd.pt")
    (convert,) = (c for c in commands(section("## Use a published model")) if "examples/convert_checkpoint.py" in c)
    assert convert_checkpoint.main(replaced(convert[2:], {"base": "base"})) == 0

    text = section("### A checkpoint")
    save_files(text, workplace)
    (command,) = commands(text)
    train(command)
    results = json.loads(Path("my-lora/results.json").read_text())
    assert {"reward", "motion_smoothness", "sharpness", "flicker"} <= results["scores"].keys()
    config = results["size"] | {"alpha": json.loads(Path("self-forcing/transformer/config.json").read_text())}
    assert config["num_frames"] == 21 and config["alpha"]["_class_name"] == "CausalWanTransformer3DModel"


def save_and_train(text, workplace, monkeypatch):
    # The name TINY_SHAPES of the README's code means the random tiny pipeline.
    monkeypatch.setattr("astrolabe_diffusers.TINY_SHAPES", str(save_tiny_pipeline("tiny")))
    save_files(text, workplace)
    (python, c, code), command = commands(text)
    # `python -c` has the current folder on its path, a script in examples/ has not.
    assert (python, c, command[0]) == ("python", "-c", "PYTHONPATH=.")
    exec(code, {})
    train(command, output_dir="my-lora")
    pipe = DiffusionPipeline.from_pretrained("my-model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_frames=21, generator=generator, output_type="latent").frames


def test_transformer(workplace, monkeypatch):
    text = section("### A transformer")
    pipe = save_and_train(text, workplace, monkeypatch)
    assert type(pipe.transformer).__name__ == "MyTransformer"
    assert not torch.allclose(sample(pipe), sample(CausalWanPipeline.from_pretrained("tiny")))
    before = sample(pipe)
    pipe.load_lora_weights("my-lora")
    assert not torch.equal(sample(pipe), before)
    names = load_file("my-lora/pytorch_lora_weights.safetensors")
    assert {"transformer.blocks.1.attn1.to_q.lora_A.weight", "transformer.blocks.0.ffn.net.2.lora_B.weight"} <= set(
        names
    )


def test_pipeline(workplace, monkeypatch):
    text = section("### A pipeline with its own block loop")
    pipe = save_and_train(text, workplace, monkeypatch)
    assert type(pipe).__name__ == "EulerPipeline"
    # Without new noise in the steps, a video is decided by the noise that it starts from.
    noise = torch.randn(1, 4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    call = dict(prompt="a red circle", num_frames=21, latents=noise, output_type="latent")
    base = CausalWanPipeline.from_pretrained("tiny")
    base.set_progress_bar_config(disable=True)
    first, second = (pipe(**call, generator=torch.Generator().manual_seed(seed)).frames for seed in (1, 2))
    others = [base(**call, generator=torch.Generator().manual_seed(seed)).frames for seed in (1, 2)]
    assert torch.equal(first, second) and not torch.allclose(*others)
    assert not any(torch.allclose(first, other) for other in others)


def test_generate_many(workplace):
    """Both commands as they stand, with the embedded model and a LoRA of the name that the training command gives."""
    from generate import main

    pipe = DiffusionPipeline.from_pretrained(TINY_SHAPES)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_adapter(pipe.transformer, "nft-tiny-shapes")
    write, generate = commands(section("## Generate many videos"))
    subprocess.run(shlex.join(write).replace("'>'", ">"), shell=True, check=True)
    prompts = Path("prompts.txt").read_text().splitlines()
    assert len(prompts) == 2 and "|" in prompts[1]
    assert main(replaced(generate[2:], {"num_videos_per_prompt": 1})) == 0
    made = [json.loads(line) for line in Path("videos/manifest.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in made] == prompts and all(Path("videos", e["file"]).is_file() for e in made)


def test_the_quick_start_a_second_time(workplace, capsys):
    """After a run that has finished, the line says how to go on."""
    from train_nft import main

    train, _ = commands(section("## Two commands"))
    arguments = train[train.index("examples/train_nft.py") + 1 :]
    with open_training_folder(NFTConfig(output_dir="nft-tiny-shapes")) as run:
        run.begin()
    Path("nft-tiny-shapes/results.json").write_text("{}")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nft-tiny-shapes holds a finished run: ") and error.count("\n") == 1
    for flag in ("--resume_from_checkpoint latest", "--overwrite_output_dir true"):
        assert flag in error and flag in section("### Long runs")


def test_reward(workplace):
    text = section("## Rewards")
    save_files(text, workplace)
    (flag,) = re.findall(r"`(--rewards my_rewards:\S+)`", text)
    save_tiny_pipeline("tiny")
    command = ["examples/train_nft.py", *flag.split(), "--model", "tiny"]
    train(command, output_dir="my-lora")
    scores = json.loads(Path("my-lora/results.json").read_text())["scores"]
    # Mean grey level of random weights' videos: neither black nor white, and the weighted sum of weight 1.
    assert 0.1 < scores["my_rewards:brightness"]["before"] < 0.9
    assert scores["reward"] == scores["my_rewards:brightness"]


def test_a_transformer_that_only_keeps_the_contract(workplace):
    """The contract of CONTRIBUTING.md suffices to sample, to train, and to load what was trained."""
    torch.manual_seed(0)
    pipe = tiny_pipeline(transformer=OwnTransformer(text_dim=TEXT_DIM))
    pipe.save_pretrained("my-model")
    command = ["examples/train_nft.py", "--model", "my-model"]
    command += ["--import_modules", "tests.own_transformer", "--prompts", "my-prompts.txt"]
    train(command, rewards="sharpness", output_dir="my-lora", kl_weight=0.1)
    before = sample(pipe)
    pipe.load_lora_weights("my-lora")
    assert not torch.equal(sample(pipe), before)
    (record,) = map(json.loads, Path("my-lora/metrics.jsonl").read_text().splitlines())
    assert record["grad_norm"] > 0


def test_a_module_that_is_not_there(workplace, capsys):
    from train_nft import main

    assert main(["--import_modules", "no_such_module"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: import_modules no_such_module (is its folder on PYTHONPATH?): No module named 'no_such_module'\n"
    )


def test_a_name_that_diffusers_has():
    with pytest.raises(ImportError, match="WanPipeline is diffusers.* name already"):
        register_with_diffusers(type("WanPipeline", (), {}))
