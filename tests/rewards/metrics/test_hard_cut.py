import pytest
import torch

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline
from astrolabe_diffusers.rewards import RewardSet, get_reward
from astrolabe_diffusers.rollout.past import Past, Switch
from astrolabe_diffusers.rollout.prompts import read_prompts, spread
from astrolabe_diffusers.rollout.samples import Sample, SampleScene
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.rollout.scoring import ScoringThread
from tests.rewards.drawn_clips import draw_clip
from tests.rewards.metrics.test_video_quality import STEADY_PAN, noisy, pan


SHAPES = draw_clip("red", "cross", "white", "right")[:17]
OTHER = draw_clip("blue", "circle", "gray", "up")[:17]


def score(video, before=8, **options):
    """Score, jump and share of frozen steps of a clip [F, 3, H, W] whose first frames are the context."""
    context = (video[None, :before] * 255).round().to(torch.uint8)
    output = get_reward("hard_cut", **options).score(video[None, before:], [""], context=context)
    return output.scores.item(), output.info["jump"].item(), output.info["frozen"].item()


@pytest.mark.parametrize("clip", [STEADY_PAN, SHAPES, noisy(SHAPES, 0.02)], ids=["pan", "shapes", "noise"])
def test_steady_motion_has_neither(clip):
    value, jump, frozen = score(clip)
    assert value == 1 and 1 <= jump < 2 and frozen == 0


@pytest.mark.parametrize("place", [8, 9, 13])
def test_a_cut_where_the_video_begins_and_later(place):
    """Twice as large is half the score; what came before the context's end is seen as well."""
    clip = torch.cat([SHAPES[:place], OTHER[place:]])
    value, jump, frozen = score(clip)
    assert jump > 8 and value == pytest.approx(3 / jump) and frozen == 0
    assert score(clip, limit=jump / 2)[0] == pytest.approx(0.5, abs=1e-3)
    pans = torch.cat([pan(range(0, 2 * place, 2)), pan(range(60, 60 + 2 * (17 - place), 2)).flip(-2)])
    assert score(pans)[1] > 3 and score(pans)[0] < 1


def test_a_slow_change_is_no_cut():
    weights = torch.linspace(0, 1, 17).view(-1, 1, 1, 1)
    assert score(torch.lerp(SHAPES, OTHER, weights))[0] == 1


def test_a_freeze_is_seen_by_the_motion_before_it():
    held = torch.cat([SHAPES[:8], SHAPES[7:8].expand(9, -1, -1, -1)])
    assert score(held)[0] == 0 and score(held)[2] == 1
    part = torch.cat([SHAPES[:11], SHAPES[10:11].expand(6, -1, -1, -1)])
    assert score(part)[2] == pytest.approx(6 / 9)
    # Where nothing moved before, nothing has frozen.
    still = SHAPES[:1].expand(17, -1, -1, -1)
    assert score(still) == (1, 1, 0)


def test_without_frames_before():
    assert score(SHAPES, before=0)[0] == 1 and score(SHAPES[:2], before=0)[0] == 1
    assert score(torch.cat([SHAPES[:6], OTHER[6:]]), before=0)[1] > 8


def test_a_batch_scores_as_its_members():
    clips = torch.stack([SHAPES, OTHER, torch.cat([SHAPES[:9], OTHER[9:]])])
    context = (clips[:, :8] * 255).round().to(torch.uint8)
    scores = get_reward("hard_cut").score(clips[:, 8:], [""] * 3, context=context).scores
    torch.testing.assert_close(scores, torch.tensor([score(clip)[0] for clip in clips]))


def test_cuts_of_the_embedded_model():
    """Where the prompt stays the same, a cut jumps further than any video that goes on, and scores lower."""
    pipe = CausalWanPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    prompts = spread(read_prompts(f"{TINY_SHAPES}/prompts/test.txt"), 4)
    outputs = {}
    with ScoringThread(pipe.vae, RewardSet({"hard_cut": 1.0})) as scoring:
        for transition in ("recache", "cut"):
            past = Past(6, switch=Switch(6, transition))
            samples = [
                Sample(prompt, i, ("hard cut", i), (SampleScene(prompt.text), SampleScene(prompt.text, past.switch)))
                for i, prompt in enumerate(prompts)
            ]
            size = {"height": 96, "width": 96, "num_frames": 33}
            (batch,) = Rollout(pipe, scoring).generate([samples], size, past)
            outputs[transition] = batch.scores.result().values
    for part, sign in (("hard_cut/jump", 1), ("hard_cut", -1), ("hard_cut/frozen", 1)):
        assert (sign * outputs["cut"][part]).min() > (sign * outputs["recache"][part]).max()


def test_a_limit_below_one():
    with pytest.raises(ValueError, match="limit must be at least 1"):
        get_reward("hard_cut", limit=0.5)
