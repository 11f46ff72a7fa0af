import math

import numpy as np
import pytest
from PIL import Image

from astrolabe_diffusers.evaluation.held_out import HeldOut
from astrolabe_diffusers.reporting.comparison import Evaluation, paired_difference
from astrolabe_diffusers.reporting.videos import video_images, write_columns
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import eval_samples
from astrolabe_diffusers.rollout.sampling import Rollout, Sampler
from astrolabe_diffusers.rollout.scoring import decode_videos
from astrolabe_diffusers.training.policies import use_policy
from tests.training.helpers import policy_pipeline, reward_worker


SIZE = {"height": 32, "width": 32, "num_frames": 9}
SAMPLES = eval_samples([Prompt("a red circle"), Prompt("a green cross"), Prompt("a blue square")], num_seeds=2)


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline(**SIZE, num_layers=1)


def run(pipe, batch_size, folder=None, num_videos=0):
    worker = reward_worker(pipe, watched="tests.training.rewards:contrast")
    with use_policy(pipe.transformer, "current"):
        result = HeldOut(Rollout(pipe, worker), SAMPLES, SIZE, batch_size, num_videos).evaluate(5, folder)
    worker.close()
    return result


def test_same_videos_every_time_whatever_the_batches(pipe):
    first, _ = run(pipe, batch_size=4)
    second, _ = run(pipe, batch_size=3)
    assert first.step == 5 and len(first.scores["reward"]) == len(SAMPLES)
    assert first.scores.keys() > {"reward", "tests.training.rewards:brightness/red", "tests.training.rewards:contrast"}
    for name, values in first.scores.items():
        assert values == pytest.approx(second.scores[name], abs=1e-5)
    assert len({round(value, 6) for value in first.scores["reward"]}) == len(SAMPLES)
    assert first.mean() == pytest.approx(np.mean(first.scores["reward"]))


def test_first_videos_are_kept_and_written(pipe, tmp_path):
    _, videos = run(pipe, 4, tmp_path / "videos", num_videos=2)
    assert sorted(videos) == [0, 1] and videos[0].shape == (9, 3, 32, 32)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["000.mp4", "001.mp4"]
    import imageio.v3

    frames = imageio.v3.imread(tmp_path / "videos" / "000.mp4")
    assert frames.shape == (9, 32, 32, 3)
    expected = (videos[0].permute(0, 2, 3, 1) * 255).numpy()
    assert np.abs(frames - expected).mean() < 12  # lossy, but this video


def test_batches_are_reported(pipe):
    worker, calls = reward_worker(pipe), []
    HeldOut(Rollout(pipe, worker), SAMPLES, SIZE, 4).evaluate(on_batch=lambda *call: calls.append(call))
    worker.close()
    assert calls == [(1, 2), (2, 2)]


def test_comparison_shows_reference_and_current(pipe, tmp_path):
    policies = {name: use_policy(pipe.transformer, name) for name in ("reference", "current")}
    rollout = Rollout(pipe, None)
    columns = HeldOut(rollout, SAMPLES, SIZE, 2, num_videos=3).generate_columns(policies)
    prompts = [sample.prompt.text for sample in SAMPLES[:3]]
    files = write_columns(columns, prompts, tmp_path / "before_after", pipe.config.frame_rate)
    assert files == [str(tmp_path / f"before_after.{kind}") for kind in ("mp4", "png", "gif")]
    assert (tmp_path / "before_after.mp4").stat().st_size > 0
    sheet = np.array(Image.open(tmp_path / "before_after.png")).astype(int)
    for policy, left in (("reference", 8), ("current", sheet.shape[1] // 2 + 8)):
        with use_policy(pipe.transformer, policy):
            embeds = rollout.encoder(sample.prompt.text for sample in SAMPLES[:2])
            videos = decode_videos(pipe.vae, Sampler(pipe, SIZE)(embeds, SAMPLES[:2])[0])
        frame = np.array(video_images(videos[0], (96, 96))[0])
        # The first frame of the first row is where this side begins, below the headings and a caption.
        assert np.abs(sheet[52:148, left : left + 96] - frame).max() <= 1
    assert pipe.transformer.active_adapters() == ["default"]


def test_paired_difference():
    generator = np.random.default_rng(0)
    before, after = generator.random(50), generator.random(50) + 0.1
    difference = paired_difference(before.tolist(), after.tolist())
    assert difference["change"] == pytest.approx((after - before).mean())
    assert difference["half_width_95"] == pytest.approx(1.96 * (after - before).std(ddof=1) / np.sqrt(50))
    with_nan = paired_difference([math.nan, *before.tolist()], [1.0, *after.tolist()])
    assert with_nan == pytest.approx(difference)
    assert Evaluation(0, {"reward": [1.0, math.nan, 3.0]}).mean() == 2.0
    assert math.isnan(paired_difference([1.0], [2.0])["half_width_95"])
