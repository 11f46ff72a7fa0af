"""The benchmark of training on the tiny pipeline."""

import re


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


def test_rewards_of_published_runs_exist():
    from astrolabe_diffusers.rewards.registry import _REGISTRY
    from tests.training.test_published_runs import RUNS

    assert {reward for _, rewards, *_ in RUNS.values() for reward in rewards} <= set(_REGISTRY)
