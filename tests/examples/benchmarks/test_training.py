"""The benchmark of training on the tiny pipeline."""

import re

import pytest

from astrolabe_diffusers import TINY_SHAPES, CausalWanTransformer3DModel
from tests.examples.benchmarks.test_generation import cells
from tests.tiny_pipeline import SMALL as TINY
from tests.tiny_pipeline import save_tiny_pipeline


SIZES = ["--samples_per_prompt", "2", "--batches_per_epoch", "2", "--num_train_epochs", "2"]
SMALL = ["--height", "16", "--width", "32", "--num_frames", "9", "--rank", "4", "--mixed_precision", "no"]


def test_sizes_and_rewards_are_those_of_the_published_run(model_folder, capsys):
    from training import main

    model = ["--model", str(model_folder), "--local_attn_size", "6", "--sink_size", "0"]
    rewards = ["--rewards", "tests.training.rewards:brightness"]
    code = main(["--config", "self_forcing_video_hpsv3", *model, *SMALL, *rewards, *SIZES])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "self_forcing_video_hpsv3 on 1 process: batches of 3, groups of 2, 6 samples an epoch, as given" in output
    assert "step 2/2" in output and "9 frames of 16x32" in output
    figures = re.search(r"^seconds_sampling \S+  seconds_scoring \S+  seconds_training \S+", output, re.MULTILINE)
    assert figures and re.search(r"^process 0: peak memory \S+ GB, LoRA [0-9a-f]{12}$", output, re.MULTILINE)


def test_another_algorithm(model_folder, capsys):
    from training import main

    sizes = ["--samples_per_prompt", "2", "--batches_per_epoch", "1", "--train_batch_size", "2"]
    assert main(["--algorithm", "awm", "--model", str(model_folder), *SMALL, *sizes]) == 0
    assert re.search(r"(?m)^seconds_sampling .*\nprocess 0: peak memory \S+ GB, LoRA", capsys.readouterr().out)


@pytest.mark.parametrize("switch_prompts", ["pairs", "scenes"])
def test_videos_that_change_their_prompt(switch_prompts, tmp_path, monkeypatch, capsys):
    """Epochs switch; the video that warms up is a block of the last scene, whose text is stored as it is."""
    import training

    (tmp_path / "prompts").mkdir()
    caption = "a {} circle moves left on a black background".format
    for split, colors in {"train": ("red", "green"), "test": ("blue", "yellow")}.items():
        lines = [*map(caption, colors)] if switch_prompts == "pairs" else [" [1.5s] | ".join(map(caption, colors))]
        (tmp_path / "prompts" / f"{split}.txt").write_text("\n".join(lines))
    ended, write_results = [], training.write_results
    monkeypatch.setattr(training, "write_results", lambda trainer: (ended.append(trainer), write_results(trainer)))
    # A reward that reads the captions.
    settings = ["--config", "tiny_shapes_switch", "--model", TINY_SHAPES, "--eval_rewards", "flicker"]
    settings += ["--prompts", str(tmp_path / "prompts"), "--switch_prompts", switch_prompts]
    settings += ["--prompt_embeds_dir", str(tmp_path / "embeds"), "--num_train_epochs", "1"]
    sizes = ["--samples_per_prompt", "2", "--batches_per_epoch", "1", "--train_batch_size", "2"]
    code = training.main([*settings, *sizes])
    output = capsys.readouterr()
    assert code == 0, output.err
    (trainer,) = ended
    (sample,) = trainer.held_out.samples
    assert sample.texts in ([caption("blue")], [caption("yellow")]) and trainer.held_out.size["num_frames"] == 9
    assert trainer.windows.past(0).switch.transition in ("roll", "recache")


def test_rewards_of_published_runs_exist():
    from astrolabe_diffusers.rewards.registry import _registered
    from tests.training.test_published_runs import RUNS

    assert {reward for _, rewards, *_ in RUNS.values() for reward in rewards} <= set(_registered())


def rows_of(output):
    """By its label, of the table's rows; the heading has none."""
    lines = output.splitlines()
    table = [cells(line) for line in lines[lines.index("") + 1 :]]
    return {label: values for label, *values in [table[0], *table[2:]]}


COLUMNS = ["published way", "ours, noisy context", "ours", "ours, compiled"]
GRADIENT = ["a step's gradient, s", "..., a sample, s"]
KERNELS = ["..., operators", "..., attention, s", "..., products of matrices, s", "..., rest, s"]
SAMPLING = ["rollout of a video, the old policy, s", "..., the base, s", "decoding a block for the rewards, s"]


@pytest.fixture
def passes(monkeypatch):
    """Whether ours is compiled, its context and blocks a pass, of every gradient; nothing is compiled, which would
    take a minute."""
    import operations
    import training_comparison

    monkeypatch.setattr(operations, "SECONDS_A_KERNEL", 0)
    compiled, seen, accumulate = [], [], training_comparison.accumulate_gradients

    def accumulate_gradients(accelerator, model, batch, config, *args):
        seen.append((len(compiled), config.context, config.num_pass_blocks))
        return accumulate(accelerator, model, batch, config, *args)

    monkeypatch.setattr(training_comparison, "accumulate_gradients", accumulate_gradients)
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "compile_repeated_blocks", lambda _, **kwargs: compiled.append(kwargs)
    )
    return seen


def test_the_table(model_folder, own_precision, passes, monkeypatch, capsys):
    """In the precision of published runs, on the LoRA in float32."""
    import training

    results, compare = {}, training.compare
    monkeypatch.setattr(training, "compare", lambda *args, **kwargs: results.update(compare(*args, **kwargs)))
    sizes = ["--height", "16", "--width", "32", "--num_frames", "33", "--rank", "4", "--train_batch_size", "2"]
    flags = ["--model", str(model_folder), *sizes, "--baseline", "--profile", "--repetitions", "1"]
    assert training.main([*flags, "--blocks_per_pass", "2"]) == 0
    output = capsys.readouterr().out
    about, *said = output[: output.index("\n\n")].splitlines()
    assert "bfloat16, mixed precision bf16, 2 x 33 frames of 16x32, LoRA of rank 4" in about
    # What was measured is said by each column, at once.
    assert [line.split(":")[0] for line in said] == [name for name, n in zip(COLUMNS, (4, 2, 4, 4)) for _ in range(n)]
    rows = rows_of(output)
    assert list(rows) == ["", *GRADIENT, *KERNELS, *SAMPLING] and list(results) == COLUMNS
    assert rows[""] == [*COLUMNS, "times faster", "floor"]
    published, _, eager, compiled = results.values()
    assert rows[GRADIENT[0]][:4] == [f"{result.gradient:.3f}" for result in results.values()]
    assert rows[GRADIENT[1]][0] == f"{published.gradient / 2:.3f}"
    assert rows[GRADIENT[0]][4].split(" / ")[2] == f"{published.gradient / compiled.gradient:.2f}"
    assert rows[SAMPLING[0]][:3] == [f"{published.old:.3f}", "-", f"{eager.old:.3f}"]
    assert rows[SAMPLING[1]][4].split(" / ") == [
        "-",
        f"{published.base / eager.base:.2f}",
        f"{published.base / compiled.base:.2f}",
    ]
    number = [int(cell) for cell in rows["..., operators"][:4]]
    assert number[3] > number[2] > number[1] > 0 and number[0] > 0  # of more passes
    # Once to compile, once to be timed, once for the profile; three blocks are two passes, which cannot be compiled.
    assert passes == [(0, "noisy", 2)] * 3 + [(0, "clean", 2)] * 3 + [(1, "clean", 1)] * 3


def test_parts_of_the_table(model_folder, passes, capsys):
    from training import main

    flags = ["--model", str(model_folder), *SMALL, "--baseline", "--repetitions", "1"]
    assert main([*flags, "--parts", "decoding"]) == 0
    assert list(rows_of(capsys.readouterr().out)) == ["", SAMPLING[2]] and not passes
    assert main([*flags, "--parts", "gradient", "--kl_weight", "0"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["", *GRADIENT]
    # A clip of one pass is compiled as it is.
    assert passes[-1][1:] == ("clean", 7)


@pytest.mark.gpu
def test_the_table_of_a_gpu(tmp_path, own_precision, capsys):
    """Compiled in earnest, flex attention too."""
    from training import main

    # Of one layer attention takes half a millisecond, which is rounded to 0 or 1.
    folder = save_tiny_pipeline(tmp_path, **TINY, num_layers=4, attention_head_dim=64)
    sizes = ["--height", "16", "--width", "32", "--num_frames", "33", "--rank", "16"]
    assert main(["--model", str(folder), *sizes, "--baseline", "--profile", "--repetitions", "1"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert "..., peak memory, GB" in rows
    assert all(float(cell) > 0 for cell in rows["..., attention, s"][:4] + rows["..., launches"][:4])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm", "awm"], "is of --algorithm nft, not awm"),
        (["--compile"], "takes no --compile"),
        (["--context", "noisy"], "no --context"),
        (["--window_size", "3"], "no --window_size"),
        (["--loss_weighting", "adaptive"], "with --loss_weighting none"),
    ],
)
def test_what_has_no_baseline(model_folder, flags, message, capsys):
    from training import main

    assert main(["--model", str(model_folder), *SMALL, "--baseline", *flags]) != 0
    assert message in capsys.readouterr().err


def test_flags_of_the_table(capsys):
    from training import main

    assert main(["--recipe", "self-forcing", "--profile"]) != 0
    assert "--profile belong to --baseline" in capsys.readouterr().err
