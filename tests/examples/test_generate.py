"""Whole runs of examples/generate.py on the random tiny pipeline."""

import functools
import json
import os
import signal
import sys
import threading
import weakref
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import export_to_video
from safetensors.torch import save_file

from astrolabe_diffusers import TinyWanDecoder
from astrolabe_diffusers.files.output_folder import RunFolder
from astrolabe_diffusers.files.video import VideoWriter
from astrolabe_diffusers.pipelines.pipeline_causal_wan import CausalWanPipeline
from astrolabe_diffusers.pipelines.quantization import quantization_config
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rollout import reward_thread
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training.adapter_files import WEIGHT_NAMES, save_adapter
from tests.layouts.test_wan_autoencoder import original_name
from tests.processes import Script, Torchrun
from tests.tiny_decoder_files import tiny_decoder_tensors
from tests.tiny_pipeline import random_vae, tiny_pipeline, tiny_shapes_captions, tiny_vae
from tests.training.helpers import full_disk, policy_pipeline, threads_left


sys.path.append(str(Path(__file__).parents[2] / "examples"))
from generate import main  # noqa: E402


SCRIPT = str(Path(__file__).parents[2] / "examples" / "generate.py")
PROMPT = "a red circle moves left on a black background"
# As many layers as the published autoencoder, which the names in its file count.
WAN = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
BRIGHTNESS = "tests.training.rewards:brightness"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of twelve prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(tiny_shapes_captions()[::16][:12]))
    return path


@pytest.fixture
def first_prompts(prompts, tmp_path):
    """A file of the first five of them."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts.read_text().splitlines()[:5]))
    return path


@pytest.fixture(scope="module")
def single(model_folder, prompts, tmp_path_factory):
    """Output folder of the twelve prompts, made one at a time by this process."""
    folder = tmp_path_factory.mktemp("single")
    assert main(arguments(model_folder, folder, prompts=prompts)) == 0
    return folder


def arguments(model, output_dir, /, **values) -> list[str]:
    values = {"model": model, "output_dir": output_dir} | values
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split(" | "))]


def read_manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def videos(folder) -> list[Path]:
    return sorted(folder.glob("*.mp4"))


def modified(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in videos(folder)}


@functools.cache
def pixels_once(path) -> np.ndarray:
    """Of a file that stays as it is."""
    return imageio.v3.imread(path)


def expected_frames(pipe, path, prompt, key, fps=16, **kwargs) -> np.ndarray:
    """What a file has to decode to: a video of `pipe(...)` that diffusers' own function has encoded."""
    images = pipe(prompt, generator=seeded_generator("video", *key), output_type="pil", **kwargs).frames[0]
    return imageio.v3.imread(export_to_video(images, str(path), fps=fps))


@pytest.fixture
def pipe(model_folder):
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_file_is_the_video_of_the_pipeline(model_folder, pipe, tmp_path, capsys):
    options = dict(num_frames=33, height=32, width=16, sigmas="1.0 | 0.5", max_sequence_length=12, fps=8, seed=5)
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT, num_videos_per_prompt=2, **options)) == 0
    entries = read_manifest(tmp_path)
    for number, entry in enumerate(entries):
        path = tmp_path / entry["file"]
        assert path.name == f"00000-{number}-a-red-circle-moves-left-on-a-black-backg.mp4"
        size = dict(num_frames=33, height=32, width=16, sigmas=[1.0, 0.5], max_sequence_length=12)
        expected = expected_frames(pipe, tmp_path / "whole.mp4", PROMPT, (5, 0, number), fps=8, **size)
        decoded = imageio.v3.imread(path)
        assert decoded.shape == (33, 32, 16, 3)
        np.testing.assert_array_equal(decoded, expected)
        assert imageio.v3.immeta(path)["fps"] == 8
        facts = {"prompt": PROMPT, "prompt_index": 0, "video_number": number, "seed": 5, "num_frames": 33, "fps": 8}
        facts |= {"height": 32, "width": 16, "model": model_folder.name, "lora": {}, "sigmas": [1.0, 0.5]}
        assert facts.items() <= entry.items()
        assert entry["frames_per_second"] == pytest.approx(33 / entry["seconds"])
    assert not np.array_equal(*(imageio.v3.imread(tmp_path / entry["file"]) for entry in entries))
    assert "videos made: 2, skipped: 0" in capsys.readouterr().out


def test_tiny_decoder(model_folder, pipe, tmp_path, capsys):
    """Of a file and of a folder; the folder of videos never mixes its frames with the autoencoder's."""
    file, folder = tmp_path / "taew2_1.pth", tmp_path / "decoder"
    torch.save(tiny_decoder_tensors(), file)
    pipe.tiny_decoder = TinyWanDecoder.from_single_file(file)
    pipe.tiny_decoder.save_pretrained(folder)
    expected = expected_frames(pipe, tmp_path / "whole.mp4", PROMPT, (0, 0, 0), num_frames=9)
    command = arguments(model_folder, tmp_path / "out", prompt=PROMPT, num_frames=9)
    for options in (["--tiny_decoder", str(file)], [], ["--tiny_decoder", str(folder)]):
        for made in (1, 0):
            assert main([*command, *options]) == 0
            assert f"videos made: {made}" in capsys.readouterr().out
        (entry,) = read_manifest(tmp_path / "out")
        assert entry.get("tiny_decoder") == (Path(options[1]).name if options else None)
        same = np.array_equal(imageio.v3.imread(tmp_path / "out" / entry["file"]), expected)
        assert same == bool(options)


def test_an_autoencoder_of_one_s_own(tmp_path, capsys):
    """LightVAE's kind of file, and a folder of the same: other widths, other frames, and the same latents."""
    torch.manual_seed(0)
    pipe = tiny_pipeline(vae=random_vae(**WAN).float().eval())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    light = random_vae(**WAN | {"base_dim": 2}).float().eval()
    file, folder = tmp_path / "lightvaew2_1.safetensors", tmp_path / "vae"
    save_file({original_name(name): tensor.clone() for name, tensor in light.state_dict().items()}, file)
    light.save_pretrained(folder)
    command = arguments(tmp_path / "model", tmp_path / "out", prompt=PROMPT, num_frames=9)
    expected = {None: expected_frames(pipe, tmp_path / "exact.mp4", PROMPT, (0, 0, 0), num_frames=9)}
    pipe.vae = light
    frames = expected_frames(pipe, tmp_path / "light.mp4", PROMPT, (0, 0, 0), num_frames=9)
    expected |= {file: frames, folder: frames}
    assert not np.array_equal(expected[None], expected[file])
    for vae, frames in expected.items():
        for made in (1, 0):
            assert main([*command, *(["--vae", str(vae)] if vae else [])]) == 0
            assert f"videos made: {made}" in capsys.readouterr().out
        (entry,) = read_manifest(tmp_path / "out")
        assert entry.get("vae") == (vae.name if vae else None)
        np.testing.assert_array_equal(imageio.v3.imread(tmp_path / "out" / entry["file"]), frames)


def test_quantization(model_folder, tmp_path, capsys):
    """The manifest says so; a folder never mixes its videos with others. Saved so, a model is generated with as it is,
    and not quantised again."""
    pytest.importorskip("torchao")
    config = quantization_config("int8_weight_only", torch.device("cpu"))
    pipe = DiffusionPipeline.from_pretrained(model_folder, dtype=torch.bfloat16, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "quantized")
    expected = expected_frames(pipe, tmp_path / "whole.mp4", PROMPT, (0, 0, 0), num_frames=9)
    options = ["--quantization", "int8_weight_only"]
    command = arguments(model_folder, tmp_path / "out", prompt=PROMPT, num_frames=9)
    for flags in (options, ["--dtype", "bfloat16"]):
        for made in (1, 0):
            assert main([*command, *flags]) == 0
            assert f"videos made: {made}" in capsys.readouterr().out
        (entry,) = read_manifest(tmp_path / "out")
        assert entry.get("quantization") == ("int8_weight_only" if flags is options else None)
        assert entry["dtype"] == "bfloat16"
        assert np.array_equal(imageio.v3.imread(tmp_path / "out" / entry["file"]), expected) == (flags is options)
    command = arguments(tmp_path / "quantized", tmp_path / "out", prompt=PROMPT, num_frames=9, dtype="bfloat16")
    assert main(command) == 0
    (entry,) = read_manifest(tmp_path / "out")
    np.testing.assert_array_equal(imageio.v3.imread(tmp_path / "out" / entry["file"]), expected)
    capsys.readouterr()
    assert main([*command, *options]) == 2
    assert capsys.readouterr().err.endswith("quantized is quantised as it is: leave out quantization.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("float8", "quantization float8 needs a GPU of compute capability 8.9 or more"),
        ("int8_weight_only --dtype float16", "quantization needs dtype bfloat16, not float16"),
        ("int8_weights", "quantization must be one of float8, int8_weight_only, not 'int8_weights' (did you mean"),
    ],
)
def test_quantizations_that_cannot_be(tmp_path, monkeypatch, capsys, options, words):
    """Before a model is looked for."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = arguments(tmp_path / "no-model", tmp_path / "out", prompt=PROMPT)
    assert main([*command, "--quantization", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_an_autoencoder_that_does_not_fit(model_folder, tmp_path, capsys):
    torch.save({"decoder.1.weight": torch.ones(1)}, tmp_path / "taew2_1.pth")
    tiny_vae(patch_size=2).save_pretrained(tmp_path / "other")
    for name, words in {"taew2_1.pth": "it has no encoder.conv1.weight", "other": "(4, 4, 16) a latent"}.items():
        command = arguments(model_folder, tmp_path / "out", prompt=PROMPT, vae=tmp_path / name)
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: cannot load the autoencoder {tmp_path / name}: ") and words in line


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({}, "is no tiny decoder in the format of TAEHV"), (dict(channels=16), "is of another autoencoder: it has")],
)
def test_a_tiny_decoder_that_does_not_fit(model_folder, tmp_path, capsys, tensors, words):
    file = tmp_path / "taew2_1.pth"
    torch.save(tiny_decoder_tensors(**tensors) if tensors else {"conv1.weight": torch.ones(1)}, file)
    assert main([*arguments(model_folder, tmp_path / "out", prompt=PROMPT), "--tiny_decoder", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot load the tiny decoder {file}: ") and words in line


def test_a_video_of_other_noise_is_made_anew(model_folder, tmp_path, capsys):
    """Before, noise was drawn channels before frames, and the manifest did not say."""
    command = arguments(model_folder, tmp_path, prompt=PROMPT, num_frames=9)
    for made in (1, 0, 1):
        assert main(command) == 0
        assert f"videos made: {made}" in capsys.readouterr().out
        if not made:
            (entry,) = read_manifest(tmp_path)
            del entry["noise_layout"]
            (tmp_path / "manifest.jsonl").write_text(json.dumps(entry) + "\n")


def test_frames_are_rounded_to_whole_blocks(model_folder, tmp_path, caplog):
    options = dict(height=16, width=16, num_videos_per_prompt=2)
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT, num_frames=44, **options)) == 0
    assert "`num_frames=44` is rounded down to 33" in caplog.text
    assert [entry["num_frames"] for entry in read_manifest(tmp_path)] == [33, 33]
    assert imageio.v3.imread(videos(tmp_path)[0]).shape == (33, 16, 16, 3)
    made = modified(tmp_path)
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT, num_frames=33, **options)) == 0
    assert modified(tmp_path) == made


def test_a_model_that_is_not_finite(model_folder, tmp_path, capsys):
    """A line, and no video that is whole."""
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.transformer.proj_out.bias.data[0] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main(arguments(tmp_path / "model", tmp_path / "out", prompt=PROMPT)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 00000-0-a-red-circle-moves-left-on-a-black-backg.mp4: the latents of a block have")
    assert list((tmp_path / "out").glob("*.mp4*")) == [] and read_manifest(tmp_path / "out") == []


def test_scenes(model_folder, pipe, tmp_path):
    """Without --num_frames a video is as long as its scenes; with --plain_prompts there are none."""
    texts = [f"{PROMPT} [1.5s#] | a green cross [.75s]", PROMPT, f"a green cross [2.25s] | {PROMPT}[.75s]"]
    (tmp_path / "scenes.txt").write_text("\n".join(texts))
    command = arguments(model_folder, tmp_path, prompts=tmp_path / "scenes.txt", batch_size=3)
    assert main(command) == 0
    entries = read_manifest(tmp_path)
    assert [entry["num_frames"] for entry in entries] == [33, 21, 45]
    for index, (entry, text) in enumerate(zip(entries, texts)):
        expected = expected_frames(pipe, tmp_path / "whole.mp4", text, (0, index, 0))
        np.testing.assert_array_equal(imageio.v3.imread(tmp_path / entry["file"]), expected)
    assert main([*command, "--plain_prompts"]) == 0
    entries = read_manifest(tmp_path)
    assert [entry["prompt"] for entry in entries] == texts and {entry["num_frames"] for entry in entries} == {21}


def test_memory_holds_a_block_and_not_the_video(model_folder, tmp_path, monkeypatch):
    written, pieces, alive = [], [], []
    write, stream = VideoWriter.write, CausalWanPipeline.stream

    def watched_write(writer, frames):
        written.append(len(frames))
        write(writer, frames)

    def watched_stream(*args, **kwargs):
        for frames in stream(*args, **kwargs):
            pieces.append(weakref.ref(frames))
            alive.append(sum(piece() is not None for piece in pieces))
            yield frames

    monkeypatch.setattr(VideoWriter, "write", watched_write)
    monkeypatch.setattr(CausalWanPipeline, "stream", watched_stream)
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT, num_frames=81)) == 0
    assert written == [9] + [12] * 6
    # The new block, and the one before, which the loop lets go when it takes the new one.
    assert max(alive) <= 2 and len(alive) == 7


def test_second_run_skips_and_repairs(model_folder, first_prompts, tmp_path, capsys):
    command = arguments(model_folder, tmp_path, prompts=first_prompts, batch_size=3, num_frames=9)
    assert main(command) == 0
    before, names = modified(tmp_path), sorted(modified(tmp_path))
    pixels = {path.name: imageio.v3.imread(path) for path in videos(tmp_path)}
    assert len(before) == 5
    assert main(command) == 0
    assert modified(tmp_path) == before
    assert "videos made: 0, skipped: 5" in capsys.readouterr().out

    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-30])
    (tmp_path / names[1]).unlink()
    os.truncate(tmp_path / names[3], 1000)
    (tmp_path / f"{names[1]}.partial").write_bytes(b"torn")
    assert main(command) == 0
    assert "videos made: 3, skipped: 2" in capsys.readouterr().out
    changed = {name for name, at in modified(tmp_path).items() if before[name] != at}
    assert changed == {names[1], names[3], names[4]}
    assert not list(tmp_path.glob("*.partial"))
    for path in videos(tmp_path):
        # In another batch only the rounding differs.
        assert np.abs(imageio.v3.imread(path).astype(int) - pixels[path.name]).mean() < 0.5
    assert [entry["prompt_index"] for entry in read_manifest(tmp_path)] == list(range(5))


def test_other_settings_are_made_anew(model_folder, tmp_path, capsys):
    command = arguments(model_folder, tmp_path, prompt=PROMPT, num_frames=9)
    assert main(command) == 0
    (path,) = videos(tmp_path)
    first = imageio.v3.imread(path)
    assert main([*command, "--seed", "1"]) == 0
    assert "videos made: 1, skipped: 0" in capsys.readouterr().out
    assert np.abs(imageio.v3.imread(path).astype(int) - first).mean() > 2
    assert [entry["seed"] for entry in read_manifest(tmp_path)] == [1]
    assert main(arguments(model_folder, tmp_path, prompt="a green cross", num_frames=9)) == 0
    assert "other videos in this folder, of other prompts: 1" in capsys.readouterr().out
    assert len(videos(tmp_path)) == len(read_manifest(tmp_path)) == 2


def test_prompts_of_a_dataset(model_folder, first_prompts, tmp_path, monkeypatch):
    """In a folder of its repository, with a name of its own for the column."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = first_prompts.read_text().splitlines()
    (tmp_path / "set" / "some").mkdir(parents=True)
    (tmp_path / "set" / "some" / "test.csv").write_text("\n".join(["caption", *prompts]))
    where = {"prompts": tmp_path / "set", "data_dir": "some", "column": "caption", "split": "test[:2]"}
    assert main(arguments(model_folder, tmp_path / "videos", num_frames=9, **where)) == 0
    assert [line["prompt"] for line in read_manifest(tmp_path / "videos")] == prompts[:2]


def test_batch_size_does_not_matter(single, model_folder, first_prompts, tmp_path):
    assert main(arguments(model_folder, tmp_path, prompts=first_prompts, batch_size=3)) == 0
    for one, many in zip(videos(single)[:5], videos(tmp_path), strict=True):
        assert one.name == many.name
        one, many = pixels_once(one).astype(int), imageio.v3.imread(many)
        assert one.shape == many.shape and np.abs(one - many).mean() < 0.5
    pixels = [pixels_once(path).astype(int) for path in videos(single)]
    assert min(np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]) > 2


def test_loras_with_weights(model_folder, pipe, tmp_path):
    transformer = policy_pipeline(num_layers=1).transformer
    save_adapter(transformer, tmp_path / "run" / "checkpoints" / "checkpoint-2", "default")
    save_adapter(transformer, tmp_path / "other", "old")
    loras = {tmp_path / "run": 0.7, tmp_path / "other" / WEIGHT_NAMES["old"]: -0.4}
    lora = " | ".join(f"{path}={weight}" for path, weight in loras.items())
    command = arguments(model_folder, tmp_path / "out", prompt=PROMPT, num_frames=9, lora=lora)
    assert main([*command, "--lora_scale", "0.5"]) == 0
    entry = read_manifest(tmp_path / "out")[0]
    assert entry["lora"] == {path.name: weight for path, weight in loras.items()}

    plain = expected_frames(pipe, tmp_path / "plain.mp4", PROMPT, (0, 0, 0), num_frames=9)
    pipe.load_lora_weights(tmp_path / "run" / "checkpoints" / "checkpoint-2", adapter_name="a")
    pipe.load_lora_weights(tmp_path / "other" / WEIGHT_NAMES["old"], adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    settings = {"attention_kwargs": {"scale": 0.5}, "num_frames": 9}
    expected = expected_frames(pipe, tmp_path / "whole.mp4", PROMPT, (0, 0, 0), **settings)
    np.testing.assert_array_equal(imageio.v3.imread(tmp_path / "out" / entry["file"]), expected)
    assert np.abs(expected.astype(int) - plain).mean() > 1

    # A later checkpoint under the same name is another LoRA.
    save_adapter(policy_pipeline(num_layers=1, randomize=False).transformer, tmp_path / "run")
    assert main([*command, "--lora_scale", "0.5"]) == 0
    assert read_manifest(tmp_path / "out")[0]["weights"] != entry["weights"]


def test_rewards(model_folder, pipe, tmp_path, capsys):
    command = arguments(model_folder, tmp_path, prompt=PROMPT, num_videos_per_prompt=3, batch_size=2, num_frames=9)
    assert main(command) == 0
    assert main([*command, "--reward", f"{BRIGHTNESS}=2,sharpness=-0.5"]) == 0
    output = capsys.readouterr().out
    assert "videos made: 3, skipped: 0" in output  # those of the first run have no scores
    generators = [seeded_generator("video", 0, 0, number) for number in range(3)]
    frames = pipe(PROMPT, num_frames=9, num_videos_per_prompt=3, generator=generators, output_type="pt").frames
    bright = frames.mean(dim=(1, 2, 3, 4))
    sharp = get_reward("sharpness").score(frames, [PROMPT] * 3).scores
    for entry, b, s in zip(read_manifest(tmp_path), bright, sharp, strict=True):
        assert entry["scores"][BRIGHTNESS] == pytest.approx(b.item(), abs=1e-5)
        assert entry["scores"]["sharpness"] == pytest.approx(s.item(), abs=1e-5)
        assert f"{BRIGHTNESS}/red" in entry["scores"]
    assert f"{BRIGHTNESS} {bright.mean():.4f}, sharpness {sharp.mean():.4f}" in output
    assert f"reward {(2 * bright - 0.5 * sharp).mean():.4f}" in output
    assert main([*command, "--reward", "sharpness"]) == 0
    output = capsys.readouterr().out
    assert "videos made: 0, skipped: 3" in output and f"sharpness {sharp.mean():.4f}" in output


def test_bfloat16(model_folder, tmp_path):
    values = {"num_frames": 9, "dtype": "bfloat16", "reward": "sharpness"}
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT, **values)) == 0
    assert read_manifest(tmp_path)[0]["dtype"] == "bfloat16"
    assert len(imageio.v3.imread(videos(tmp_path)[0])) == 9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["give one of prompt, a text, prompts"]),
        ({"prompt": "a", "prompts": "b"}, ["give one of prompt, a text, prompts"]),
        ({"prompt": "a", "session": "b"}, ["give one of prompt, a text, prompts"]),
        ({"prompts": "nowhere.txt"}, ["nowhere.txt is no prompt file", "dataset"]),
        ({"prompt": "a", "num_frame": 21}, ["--num_frame", "did you mean --num_frames"]),
        ({"prompt": "a", "seed": "1 | --seed | 2"}, ["--seed is given twice"]),
        ({"prompt": "a", "num_videos_per_prompt": 10**9}, ["more than 1000000 videos"]),
        ({"prompt": "a", "num_frames": 8}, ["prompt 0", "num_frames` must be a whole number of at least 9, not 8"]),
        ({"prompt": "a", "num_frames": 0}, ["num_frames must be at least 1, not 0"]),
        ({"prompt": "a", "num_frames": "many"}, ["num_frames must be a whole number, not 'many'"]),
        ({"prompt": "a [red] car"}, ["prompt 0: prompt, character 3", "[8s]"]),
        ({"prompt": "a", "height": 30}, ["height", "multiple of 16"]),
        ({"prompt": "a", "fps": -1}, ["fps must be at least 1"]),
        ({"prompt": "a", "batch_size": 0}, ["batch_size must be at least 1"]),
        ({"prompt": "a", "sigmas": "0.5 | 1"}, ["sigmas` must fall"]),
        ({"prompt": "a", "sigmas": "1000 | 500"}, ["sigmas` must fall from at most 1", "divide them by 1000"]),
        ({"prompt": "a", "max_sequence_length": 10**9}, ["from 1 to 512 tokens, not 1000000000"]),
        ({"prompt": "x" * 100_001}, ["prompt 0: a prompt of 100001 characters: at most 100000"]),
        ({"prompt": "a caf\udce9"}, ["prompt 0: prompt, character 6", "surrogate"]),
        ({"prompt": f"a [{'9' * 400}s]"}, ["prompt 0: prompt, character 3", "at most 86400 seconds"]),
        ({"prompt": "a", "model": "/no/model"}, ["cannot load /no/model"]),
        ({"prompt": "a", "model": "self-forcin"}, ["which is no folder (did you mean self-forcing or", "`astrolabe"]),
        ({"prompt": "a", "lora": "/no/lora"}, ["cannot load the LoRA /no/lora", "Hub"]),
        ({"prompt": "a", "lora": "tests"}, ["cannot load the LoRA tests: tests holds no LoRA", ".safetensors"]),
        ({"prompt": "a", "lora": "x=nan"}, ["lora must be name=weight", "a finite number, not 'x=nan'"]),
        ({"prompt": "a", "lora": "x=1 | x=2"}, ["lora: x is given twice"]),
        ({"prompt": "a", "lora": "x", "lora_scale": "inf"}, ["lora_scale must be a number, not 'inf'"]),
        ({"prompt": "a", "lora": "x=high"}, ["lora must be name=weight", "'x=high'"]),
        ({"prompt": "a", "lora_scale": 0.5}, ["lora_scale needs a lora"]),
        ({"prompt": "a", "compile": True, "offload": "group"}, ["compile needs offload none or model"]),
        ({"prompt": "a", "dtype": "int8"}, ["int8", "float32", "bfloat16", "float16"]),
        ({"prompt": "a", "offload": "disk"}, ["disk", "none", "model", "group"]),
        ({"prompt": "a", "offload": "group"}, ["offload=group needs a GPU"]),
        ({"prompt": "a", "attention_backend": "best"}, ["best", "must be one of", "_native_flash"]),
        ({"prompt": "a", "attention_backend": "_native_cudnn"}, ["_native_cudnn on cpu"]),
        ({"prompt": "a", "reward": "beauty"}, ["unknown reward 'beauty'", "sharpness"]),
        ({"prompt": "a", "reward": "sharpness=high"}, ["rewards must be name=weight", "'sharpness=high'"]),
        ({"prompt": "a", "reward": "tests.training.rewards:broken"}, ["ZeroDivisionError"]),
        ({"prompt": "a", "reward": "tests.training.rewards:always_nan"}, ["always_nan", "nan"]),
        ({"prompt": "a", "output_dir": SCRIPT}, ["output_dir", "generate.py"]),
        ({"prompt": "a", "output_dir": "/proc/nope"}, ["output_dir '/proc/nope'"]),
        ({"prompt": "a", "reward": "sharpness", "reward_options": "flicker.x=1"}, ["'flicker' is none of"]),
        ({"prompt": "a", "reward": "sharpness", "reward_placement": "sharpness=gpu7"}, ["no place 'gpu7'"]),
        ({"prompt": "a", "reward_placement": "sharpness=cpu"}, ["need rewards"]),
        ({"prompt": "a", "reward": "sharpness", "reward_timeout": "soon"}, ["reward_timeout must be a number"]),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(model_folder, tmp_path, capsys, values, words):
    threads = set(threading.enumerate())
    try:
        assert main(arguments(model_folder, tmp_path / "out", **values)) == 2
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("out/*.partial"))
    # Those of libraries may take a moment longer.
    names = {name.partition("-")[0] for name in threads_left(threads)}
    assert names <= {"tqdm_monitor", "ThreadPoolExecutor"}


def test_a_reward_that_hangs_is_one_line(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward_thread, "PATIENCE", 0.1)
    values = {"prompt": PROMPT, "reward": "tests.training.rewards:hangs", "reward_timeout": 0.5}
    assert main(arguments(model_folder, tmp_path, **values)) == 2
    assert "error: a reward has not answered for 0.5 s" in capsys.readouterr().err


def test_options_of_rewards(model_folder, tmp_path):
    """And where they are scored."""
    reward, options = "tests.rewards.placed_rewards:Scaled", {}
    for scale in (1, 3):
        values = {"reward_options": f"{reward}.scale={scale}", "reward_placement": f"{reward}=cpu"}
        values |= {"prompt": PROMPT, "num_frames": 9, "reward": reward}
        assert main(arguments(model_folder, tmp_path / str(scale), **values)) == 0
        options[scale] = read_manifest(tmp_path / str(scale))[0]["scores"][reward]
    assert options[3] == pytest.approx(3 * options[1]) and options[1] > 0


def test_a_second_run_in_the_folder_ends_before_the_model_is_loaded(model_folder, tmp_path, capsys):
    with RunFolder(tmp_path, "generation"):
        assert main(arguments("/no/model", tmp_path, prompt=PROMPT)) == 2
    assert capsys.readouterr().err == (
        f"error: another run is writing to {tmp_path}: wait for it, or name another folder.\n"
    )


def test_a_full_disk_is_one_line(model_folder, tmp_path, capsys):
    with full_disk(100):
        assert main(arguments(model_folder, tmp_path, prompt=PROMPT)) == 2
    error = capsys.readouterr().err
    assert f"error: cannot write to {tmp_path}: " in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    assert read_manifest(tmp_path) == []


def test_launch_that_accelerate_does_not_see(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(model_folder, tmp_path, prompt=PROMPT)) == 2
    assert "ACCELERATE_USE_CPU=true" in capsys.readouterr().err


def check_whole(folder: Path):
    for path in videos(folder):
        assert len(imageio.v3.imread(path)) == 21, path


def check_equal(folder: Path, expected: Path, number: int = 12):
    """The same files as the first ones there, with the same pixels, each of them once in the manifest."""
    assert [path.name for path in videos(folder)] == [path.name for path in videos(expected)[:number]]
    for a, b in zip(videos(folder), videos(expected)):
        np.testing.assert_array_equal(imageio.v3.imread(a), pixels_once(b))
    assert [entry["prompt_index"] for entry in read_manifest(folder)] == list(range(number))


def test_two_processes_make_what_one_makes(single, model_folder, first_prompts, tmp_path):
    command = arguments(model_folder, tmp_path / "out", prompts=first_prompts, reward="sharpness")
    code, output = Torchrun(SCRIPT, *command).finish()
    assert code == 0, output
    assert "processes: 2 on cpu" in output and "videos made: 5, skipped: 0" in output
    assert output.count("videos made") == 1
    check_equal(tmp_path / "out", single, 5)
    scores = [entry["scores"]["sharpness"] for entry in read_manifest(tmp_path / "out")]
    assert f"sharpness {sum(scores) / 5:.4f}" in output


def test_interrupted_run_leaves_whole_videos(single, model_folder, prompts, tmp_path):
    command = arguments(model_folder, tmp_path, prompts=prompts)
    process = Script(SCRIPT, *command)
    process.wait_for(lambda: len(videos(tmp_path)) >= 3)
    process.signal_group(signal.SIGINT)
    code, output = process.finish(timeout=60)
    assert code == 130
    assert output.splitlines()[-1] == "interrupted: the same command makes the videos that are missing."
    assert "Traceback" not in output
    check_whole(tmp_path)
    assert 3 <= len(videos(tmp_path)) < 12 and not list(tmp_path.glob("*.partial"))
    before = modified(tmp_path)
    complete = {entry["file"] for entry in read_manifest(tmp_path)}
    assert complete == before.keys()
    assert main(command) == 0
    after = modified(tmp_path)
    assert all(after[name] == before[name] for name in complete)
    check_equal(tmp_path, single)


@pytest.mark.slow
def test_killed_processes_lose_nothing_and_make_nothing_twice(single, model_folder, prompts, tmp_path):
    command = arguments(model_folder, tmp_path, prompts=prompts)
    process = Torchrun(SCRIPT, *command)
    process.wait_for(lambda: len(videos(tmp_path)) >= 5)
    process.kill_all()
    check_whole(tmp_path)
    complete = {entry["file"] for entry in read_manifest(tmp_path)}
    before = modified(tmp_path)
    assert 3 <= len(complete) < 12

    code, output = Torchrun(SCRIPT, *command).finish()
    assert code == 0, output
    assert f"videos made: {12 - len(complete)}, skipped: {len(complete)}" in output
    assert all(modified(tmp_path)[name] == before[name] for name in complete)
    assert not list(tmp_path.glob("*.partial"))
    check_equal(tmp_path, single)


@pytest.mark.slow
def test_interrupted_processes_leave_whole_videos(single, model_folder, prompts, tmp_path):
    command = arguments(model_folder, tmp_path, prompts=prompts)
    process = Torchrun(SCRIPT, *command)
    process.wait_for(lambda: len(videos(tmp_path)) >= 4)
    process.signal_group(signal.SIGINT)
    _, output = process.finish(timeout=60)
    assert output.count("interrupted: the same command makes the videos that are missing.") == 1
    check_whole(tmp_path)
    assert len(videos(tmp_path)) < 12 and not list(tmp_path.glob("*.partial"))
    assert main(command) == 0
    check_equal(tmp_path, single)


@pytest.mark.slow
def test_error_of_one_process_ends_all_in_one_line(model_folder, prompts, tmp_path):
    """The reward fails on one of the videos of the second process; the first one still makes its own."""
    texts = prompts.read_text().splitlines()
    (tmp_path / "rewards_of_this_test.py").write_text(
        "def fails_once(videos, prompts, metadata):\n"
        f"    assert {texts[9]!r} not in prompts\n"
        "    return [1.0], None\n"
    )
    command = arguments(model_folder, tmp_path / "out", prompts=prompts, reward="rewards_of_this_test:fails_once")
    code, output = Torchrun(SCRIPT, *command, PYTHONPATH=str(tmp_path)).finish()
    assert code != 0 and output.count("error: a reward failed") == 1
    assert "videos made: 9, skipped: 0" in output
