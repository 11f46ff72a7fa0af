"""Every command and every Python snippet of README.md and docs/, followed to the letter; and what comes of it."""

import functools
import json
import re
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.main import COMMANDS
from astrolabe_diffusers.cli.main import main as astrolabe
from astrolabe_diffusers.registration import register_with_diffusers
from astrolabe_diffusers.rewards.reward_set import PLACEMENTS, check_placement
from astrolabe_diffusers.training import NFTConfig
from astrolabe_diffusers.training.algorithms import ALGORITHMS
from astrolabe_diffusers.training.run_folder import open_training_folder
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import TEXT_DIM, tiny_pipeline, tiny_shapes_captions

from .pages import PAGES, ROOT, blocks, inline_code, read_page, section
from .reader import QUICK_START, Reader, short_runs


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """The folder of README's training run, made short; with the checkpoint of half of its steps."""
    folder = tmp_path_factory.mktemp("quick-start") / "nft-tiny-shapes"
    with short_runs(num_eval_videos=1):
        assert astrolabe(["train", *QUICK_START, "--output_dir", str(folder)]) == 0
    (folder / "checkpoints" / "checkpoint-1").rename(folder / "checkpoints" / "checkpoint-40")
    return folder


@pytest.fixture(scope="module")
def follow(quick_start, tmp_path_factory):
    """Follows a page, once, and returns the folder that it was followed in."""

    @functools.cache
    def follow(page):
        folder = tmp_path_factory.mktemp(Path(page).stem)
        with pytest.MonkeyPatch.context() as patch:
            try:
                return Reader(folder, quick_start, patch).follow(page).folder
            finally:
                files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
                for name in [name for name, file in files.items() if file.startswith(f"{folder}/")]:
                    del sys.modules[name]

    return follow


@pytest.mark.parametrize("page", PAGES)
def test_page(page, follow):
    follow(page)


# README


def test_the_front_page_is_short():
    assert len(read_page("README.md").splitlines()) <= 160
    longest = {"Generate": 6, "Train": 8, "Your own reward": 10}
    for heading, most in longest.items():
        assert all(len(block.code) <= most for block in blocks(section("README.md", f"## {heading}")))


def test_front_page(follow):
    folder = follow("README.md")
    assert (folder / "after.mp4").stat().st_size > 1000
    scores = json.loads((folder / "my-bright-lora" / "results.json").read_text())["scores"]
    # Objects on black are 0.05 to 0.2; and the weighted sum is of weight 1.
    assert 0.03 < scores["my_rewards:brightness"]["before"] < 0.9
    assert scores["reward"] == scores["my_rewards:brightness"]
    assert json.loads((folder / "my-crosses" / "results.json").read_text())["scores"]["tiny_shapes_prompt_match"]


def test_the_quick_start_a_second_time(tmp_path, monkeypatch, capsys):
    """After a run that has finished, the line says how to go on."""
    monkeypatch.chdir(tmp_path)
    with open_training_folder(NFTConfig(output_dir="nft-tiny-shapes")) as run:
        run.begin()
    Path("nft-tiny-shapes/results.json").write_text("{}")
    assert astrolabe(["train", *QUICK_START]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nft-tiny-shapes holds a finished run: ") and error.count("\n") == 1
    for flag in ("--resume_from_checkpoint latest", "--overwrite_output_dir true"):
        assert flag in error and flag in read_page("docs/resuming.md")


# What the pages speak of


@pytest.fixture(scope="module")
def flags():
    """Every flag that `--help` of a command of ours shows, of training with each algorithm."""
    shown = set()
    for arguments in [*([name] for name in COMMANDS), *(["train", "--algorithm", name] for name in ALGORITHMS)]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            lines = []
            patch.setattr(sys.stdout, "write", lines.append)
            astrolabe([*arguments, "--help"])
        shown |= set(re.findall(r"--\w+", "".join(lines)))
    return shown


# Flags of others: launchers, pip, tensorboard, pytest, the benchmarks; and a family of ours.
OTHERS = {
    "--any_field",
    "--baseline",
    "--batch_sizes",
    "--config_file",
    "--cpu",
    "--encoding",
    "--viewers",
    "--num_processes",
    "--no-deps",
    "--lengths",
    "--logdir",
    "--memory_gb",
    "--num_streams",
    "--number",
    "--parts",
    "--pipeline",
    "--jobs",
    "--only",
    "--profile",
    "--repetitions",
    "--risk_ratio",
}


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_speaks_of(page, flags):
    text = read_page(page)
    if page == "docs/coming_from_astrolabe.md":  # the first column of its tables is the release's
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    spoken = {flag for code in inline_code(text) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)}
    assert spoken - OTHERS <= flags


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_speaks_of(page):
    folders = ("examples", "accelerate_configs", "astrolabe_diffusers", "tests", "docs")
    for code in inline_code(read_page(page)):
        for path in re.findall(rf"(?:^|\s)((?:{'|'.join(folders)})/[\w./]+)", code):
            assert (ROOT / path.replace("/X.", "/8gpu.")).exists(), path


def table_paths(page, heading):
    """The files in the first column of a section's table; `a.mp4`, `.gif` are two."""
    stem = ""
    for row in section(page, heading).splitlines():
        for text in re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("|") else ():
            stem, text = (stem, stem + text) if text.startswith(".") else (text.rsplit(".", 1)[0], text)
            yield re.sub(r"-N\b", "-*", text).replace("COLUMN", "base")


def test_what_a_run_writes(quick_start):
    paths = list(table_paths("docs/train.md", "## What a run writes"))
    assert len(paths) > 10
    assert [path for path in paths if not list(quick_start.glob(path.rstrip("/")))] == ["logs/"]


def test_what_an_evaluation_writes(follow):
    folder = follow("docs/evaluate.md") / "eval"
    paths = [path for path in table_paths("docs/evaluate.md", "# Evaluate") if not path.startswith("--")]
    assert paths[:2] == ["eval", "table.md"]
    assert all((folder / path).exists() for path in paths[1:])
    columns = json.loads((folder / "results.json").read_text())
    assert "half" in json.dumps(columns)


# What comes of a page


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_frames=9, generator=generator, output_type="latent").frames


def test_published_model(follow):
    """From a checkpoint as published to a video, through the folder that the page's command converts it to."""
    folder = follow("docs/published_models.md")
    assert (folder / "cat.mp4").stat().st_size > 1000
    config = json.loads((folder / "self-forcing" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "CausalWanTransformer3DModel"
    assert len(load_file(folder / "longlive-lora" / "pytorch_lora_weights.safetensors")) > 20
    pipe = DiffusionPipeline.from_pretrained(folder / "sgf-plus")
    assert pipe.memory_transformer.config.sink_size == 3 and sample(pipe).isfinite().all()


def test_a_model_that_is_added(follow):
    """By its recipe alone, from a checkpoint to a video."""
    folder = follow("docs/add_a_model.md")
    recipe = yaml.safe_load((folder / "my_recipe.yaml").read_text())
    config = json.loads((folder / "my-model" / "transformer" / "config.json").read_text())
    assert recipe["transformer"].items() <= config.items()
    pipe = DiffusionPipeline.from_pretrained(folder / "my-model")
    assert pipe.config.sigmas == recipe["pipeline"]["sigmas"]
    (entry,) = [json.loads(line) for line in (folder / "my-videos" / "manifest.jsonl").read_text().splitlines()]
    assert entry["prompt"] == "a boat on a lake" and (folder / "my-videos" / entry["file"]).stat().st_size > 1000
    assert sample(pipe).isfinite().all()


def test_released_models(follow):
    folder = follow("docs/coming_from_astrolabe.md")
    configs = {
        name: json.loads((folder / name / "transformer" / "config.json").read_text())
        for name in ("self-forcing", "causal-forcing-chunkwise", "causal-forcing-framewise", "longlive", "krea-14b")
    }
    assert [c["num_frames_per_block"] for c in configs.values()] == [3, 3, 1, 3, 3]
    assert configs["longlive"]["local_attn_size"] == 12
    assert (folder / "longlive-lora").is_dir()


def test_many_videos(follow):
    folder = follow("docs/generate.md")
    prompts = (folder / "prompts.txt").read_text().splitlines()
    made = [json.loads(line) for line in (folder / "videos" / "manifest.jsonl").read_text().splitlines()]
    assert len(prompts) == 2 and "|" in prompts[1]
    assert [entry["prompt"] for entry in made] == prompts
    assert all((folder / "videos" / entry["file"]).is_file() for entry in made)


def test_a_session_as_a_file(follow):
    videos = list((follow("docs/live.md") / "replay").glob("*.mp4"))
    assert [video.name for video in videos] == ["session-0.mp4"]
    assert len(iio.imread(videos[0], plugin="FFMPEG")) == 9 + 12


def test_settings_of_a_file(follow):
    scores = json.loads((follow("docs/train.md") / "my-lora" / "results.json").read_text())["scores"]
    assert {"reward", "motion_smoothness", "sharpness", "flicker"} <= scores.keys()


def test_own_transformer(follow):
    folder = follow("docs/customise.md")
    weights = load_file(folder / "my-model-lora" / "pytorch_lora_weights.safetensors")
    assert {"transformer.blocks.1.attn1.to_q.lora_A.weight", "transformer.blocks.0.ffn.net.2.lora_B.weight"} <= set(
        weights
    )
    own = own_pipeline(folder, "my_model", "my-model")
    assert type(own.transformer).__name__ == "MyTransformer"
    before = sample(own)
    assert not torch.allclose(before, sample(DiffusionPipeline.from_pretrained(TINY_SHAPES)))
    own.load_lora_weights(folder / "my-model-lora")
    assert not torch.equal(sample(own), before)


def test_own_pipeline(follow):
    own = own_pipeline(follow("docs/customise.md"), "my_pipeline", "my-euler")
    assert type(own).__name__ == "EulerPipeline"
    base = DiffusionPipeline.from_pretrained(TINY_SHAPES)
    # Without new noise in the steps, a video is decided by the noise that it starts from.
    config = base.transformer.config
    noise = torch.randn(1, config.in_channels, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    call = dict(prompt="a red circle", num_frames=9, latents=noise, output_type="latent")
    for pipe in (own, base):
        pipe.set_progress_bar_config(disable=True)
    first, second = (own(**call, generator=torch.Generator().manual_seed(seed)).frames for seed in (1, 2))
    others = [base(**call, generator=torch.Generator().manual_seed(seed)).frames for seed in (1, 2)]
    assert torch.equal(first, second) and not torch.allclose(*others)
    assert not any(torch.allclose(first, other) for other in others)


def own_pipeline(folder, module, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        __import__(module)
        patch.delitem(sys.modules, module)
        return DiffusionPipeline.from_pretrained(folder / name)


def test_own_callback(follow):
    folder = follow("docs/customise.md") / "my-watched-run"
    (metrics,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    product = metrics["learning_rate"] * metrics["loss"]
    assert metrics["learning_rate_times_loss"] == pytest.approx(product)


def test_own_reward(follow):
    scores = json.loads((follow("docs/rewards.md") / "videos" / "scores.json").read_text())["mean"]
    assert scores["my_rewards:NearBrightness"] == pytest.approx(1 - abs(51 / 255 - 0.7), abs=0.01)


def test_every_place_of_the_table_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    lines = section("docs/reward_placement.md", "# Reward placement").splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")][1:]
    places = [place for row in rows for place in re.findall(r"`([^`]+)`", row)]
    assert places == ["trainer", "offload", "cuda:1", "cpu", "process", "process:cuda:1", "http://host:port"]
    for place in places:
        check_placement(place, "sharpness", "sharpness")
        assert f"'{place}'" in PLACEMENTS or place == "cpu"


def test_options_of_the_text():
    options = re.search(r"--reward_options (dynamic_degree\S+?)`", read_page("docs/rewards.md"))[1]
    assert NFTConfig(reward_options=options).reward_options == {
        "dynamic_degree": {"fps": 8},
        "brisque": {"frames": "stride:4"},
    }


def test_a_module_that_is_not_there(capsys):
    assert astrolabe(["train", "--import_modules", "no_such_module"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: import_modules no_such_module (is its folder on PYTHONPATH?): No module named 'no_such_module'\n"
    )


def test_a_name_that_diffusers_has():
    with pytest.raises(ImportError, match="WanPipeline is diffusers.* name already"):
        register_with_diffusers(type("WanPipeline", (), {}))


def test_a_transformer_that_only_keeps_the_contract(tmp_path, monkeypatch):
    """The contract of CONTRIBUTING.md suffices to sample, to train, and to load what was trained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pipe = tiny_pipeline(transformer=OwnTransformer(text_dim=TEXT_DIM))
    pipe.save_pretrained("my-model")
    Path("my-prompts.txt").write_text("\n".join(tiny_shapes_captions()[:6]))
    command = "train --model my-model --import_modules tests.own_transformer --prompts my-prompts.txt --height 32"
    command += " --width 32 --num_frames 21 --rewards sharpness --kl_weight 0.1 --output_dir my-lora"
    with short_runs():
        assert astrolabe(command.split()) == 0
    before = sample(pipe)
    pipe.load_lora_weights("my-lora")
    assert not torch.equal(sample(pipe), before)
    (record,) = map(json.loads, Path("my-lora/metrics.jsonl").read_text().splitlines())
    assert record["grad_norm"] > 0
