"""Videos that change their prompt: as the pipeline's stream makes them, and whose groups share the past."""

import functools
from itertools import count

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.models.vae_streaming import decode_latents
from astrolabe_diffusers.pipelines.scene_prompt import TRANSITIONS
from astrolabe_diffusers.rewards import RewardSet
from astrolabe_diffusers.rollout.past import Past, Switch, make_windows
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import Sample, SampleScene, epoch_samples
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.rollout.scoring import ScoringThread, decode_videos
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training.nft import NFTConfig
from tests.tiny_pipeline import tiny_pipeline


OLD, NEW = "a red circle moves left on a black background", "a green cross moves up on a white background"
SIZE = {"height": 16, "width": 32, "num_frames": 69}  # 18 latent frames, two tokens each
STEPS = {"sigmas": [1.0, 0.5]}
MODELS = {
    "unlimited": STEPS,
    "relative": {**STEPS, "local_attn_size": 9, "sink_size": 3, "rope_mode": "relative"},
    "absolute window": {**STEPS, "local_attn_size": 9, "sink_size": 3, "first_block_sigmas": [1.0, 0.75, 0.5, 0.25]},
    "frames": {**STEPS, "num_frames_per_block": 1, "local_attn_size": 7, "sink_size": 5, "rope_mode": "relative"},
}
SWITCHES = {
    **{name: Switch(12, name) for name in TRANSITIONS},
    "roll over 3": Switch(12, "roll", num_blocks=3),
    "recache without the sink": Switch(12, "recache", global_sink=False),
}


@functools.cache
def pipeline(model, **settings):
    """Nothing here changes it."""
    return tiny_pipeline(**{**MODELS[model], **settings}, vae_num_res_blocks=0)


def samples(switch, number=2, group=0):
    scenes = SampleScene(OLD), SampleScene(NEW, switch)
    return [Sample(Prompt(NEW), group, (7, 0, group, k), scenes) for k in range(number)]


class Silent:
    """In place of a scoring thread."""

    def submit(self, *args):
        return None


def rollout(pipe, batch, past):
    (made,) = Rollout(pipe, Silent()).generate([batch], SIZE, past)
    return made


@functools.cache
def plain_latents(model):
    """Of the same noise, with the old prompt to the end."""
    batch = [Sample(Prompt(OLD), 0, sample.key) for sample in samples(Switch())]
    return rollout(pipeline(model), batch, Past(15)).latents


def stream(pipe, switch, generators, **kwargs):
    """The pipeline's own, whose prompt is changed by hand."""
    blocks, number = [], switch.frame // pipe.transformer.config.num_frames_per_block
    with pipe.stream([OLD] * len(generators), generator=generators, **SIZE, **kwargs) as stream:
        for block in count():
            if block == number:
                extra = {"global_sink": switch.global_sink} if switch.transition == "recache" else {}
                stream.set_prompt(NEW, switch.transition, num_blocks=switch.num_blocks, **extra)
            try:
                blocks.append(next(stream))
            except StopIteration:
                return torch.cat(blocks, dim=2 if kwargs["output_type"] == "latent" else 1)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("model", MODELS)
def test_a_rollout_is_the_stream_with_set_prompt(model, switch):
    pipe, switch = pipeline(model), SWITCHES[switch]
    batch = samples(switch)
    made = rollout(pipe, batch, Past(15, switch=switch))
    generators = [seeded_generator("sample", *sample.key) for sample in batch]
    assert torch.equal(made.latents, stream(pipe, switch, generators, output_type="latent"))
    frames = decode_videos(pipe.vae, made.latents, cuts=batch[0].cuts)
    generators = [seeded_generator("sample", *sample.key) for sample in batch]
    assert (frames - stream(pipe, switch, generators, output_type="pt")).abs().max() < 1e-5
    window = decode_videos(pipe.vae, made.latents, Past(15), batch[0].cuts)
    assert window.shape[1] == 12 and (window - frames[:, -12:]).abs().max() < 1e-5
    # And it matters.
    plain = plain_latents(model)
    assert torch.equal(made.latents[:, :, :12], plain[:, :, :12])
    assert (made.latents - plain)[:, :, 12:].abs().max() > 1e-2


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "cut"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [12, 15])
def test_a_group_parts_after_the_switch(model, switch, window):
    """From one past, which has had the transition: as the stream goes on from given latents with a sample's noise."""
    pipe, switch = pipeline(model), SWITCHES[switch]
    # What follows the past is no beginning.
    alone = pipeline(model, first_block_sigmas=None)
    batch, recached = samples(switch, 3), []

    def note(module, args, kwargs):
        if kwargs["kv_cache"].state.rewound:
            recached.append(len(args[0]))

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    made = rollout(pipe, batch, Past(window, shared=True, switch=switch))
    hook.remove()
    assert recached == [1] * (switch.transition == "recache")  # one pass for the group
    past = made.latents[:1, :, :window]
    assert all(torch.equal(past, made.latents[i : i + 1, :, :window]) for i in range(3))
    for row, sample in enumerate(batch):
        generators = [seeded_generator("sample", *sample.key)]
        expected = stream(alone, switch, generators, video=past, output_type="latent")
        assert (made.latents[row : row + 1] - expected).abs().max() < 2e-5
    assert (made.latents[0] - made.latents[1])[:, window:].abs().max() > 0.05


def settings(**values):
    return NFTConfig(window_size=3, sample_frames=15, train_batch_size=3, samples_per_prompt=3, **values)


def test_switches_are_drawn_for_every_epoch():
    config = settings(transitions=["roll", "recache", "flush"], transition_blocks=2, switch_distances=[0, 2], seed=3)
    windows = make_windows(config, 21, 3, 3)
    pasts = [windows.past(epoch) for epoch in range(60)]
    assert pasts == [make_windows(config, 21, 3, 3).past(epoch) for epoch in range(60)]
    assert {past.num_frames for past in pasts} == {3, 6, 9, 12}
    assert {(past.num_frames - past.switch.frame, past.switch.transition) for past in pasts} == {
        (distance, name) for distance in (0, 6) for name in config.transitions
    }
    # A block with the old prompt comes first.
    assert min(past.switch.frame for past in pasts) == 3
    assert {past.switch.num_blocks for past in pasts if past.switch.transition == "roll"} == {2}
    assert {past.switch.num_blocks for past in pasts if past.switch.transition != "roll"} == {1}
    assert windows.largest == Past(12, False, Switch(6, "recache"))


PROMPTS = [Prompt(name, {"line": i}) for i, name in enumerate(["a", "b | c", "d [2s] | e [3s#] | f"])]


def test_pairs_and_scenes():
    switch = Switch(6, "flush")
    epochs = [epoch_samples(PROMPTS, 3, 2, epoch, 1, switch, "pairs") for epoch in range(20)]
    plain = [epoch_samples(PROMPTS, 3, 2, epoch, 1) for epoch in range(20)]
    assert epochs == [epoch_samples(PROMPTS, 3, 2, epoch, 1, switch, "pairs") for epoch in range(20)]
    texts = [prompt.text for prompt in PROMPTS]
    for samples_, plain_ in zip(epochs, plain):
        for sample, other in zip(samples_, plain_):
            assert (sample.key, sample.texts[1], sample.prompt.metadata) == (
                other.key, other.prompt.text, other.prompt.metadata,
            )
            assert [scene.switch for scene in sample.scenes] == [Switch(), switch]
        assert all(a.scenes == b.scenes for a, b in zip(samples_[::2], samples_[1::2]))  # of a group
    pairs = {tuple(sample.texts) for epoch in epochs for sample in epoch}
    assert pairs == {(a, b) for a in texts for b in texts if a != b}

    epochs = [epoch_samples(PROMPTS[1:], 2, 2, epoch, 1, switch, "scenes") for epoch in range(20)]
    pairs = {tuple(sample.texts) for epoch in epochs for sample in epoch}
    assert pairs == {("b", "c"), ("d", "e"), ("e", "f")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transitions": ["rol"]}, "transitions: 'rol' is none of roll, recache, flush, rope_cut, cut"),
        ({"transitions": ["cut"], "shared_past": True}, "after a cut there is no past to share"),
        ({"transitions": ["roll"], "window_size": None, "sample_frames": None}, "transitions need window_size"),
        ({"transitions": ["recache"], "transition_blocks": 2}, "transition_blocks=2 is of roll"),
        ({"transitions": ["roll"], "switch_distances": [-1]}, "switch_distances must be"),
        ({"transitions": ["roll"], "window_selection": "first"}, "no window begins after a block with the old prompt"),
        ({"transitions": ["roll"], "switch_distances": [4]}, "no window begins after a block with the old prompt"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        make_windows(NFTConfig(**{**vars_of_settings(), **values}), 21, 3, 0)


def vars_of_settings():
    return {"window_size": 3, "sample_frames": 15, "train_batch_size": 3, "samples_per_prompt": 3}


def echo(videos, prompts, metadata):
    """Which text, and how many frames."""
    return [float(len(prompt)) for prompt in prompts], {"frames": [float(videos.shape[1])] * len(videos)}


def test_rewards_get_the_text_of_each_frame():
    """In a window after the switch the new one; of a whole video each scene's, weighted by its frames."""
    pipe = tiny_pipeline(**STEPS, vae_num_res_blocks=0)
    rewards = RewardSet({"echo": 1.0}, rewards={"echo": echo})
    scenes = [SampleScene("four"), SampleScene("eight888", Switch(6)), SampleScene("x", Switch(12, "cut"))]
    two = Sample(Prompt("of two"), 0, (0, 0), tuple(scenes[:2]))
    three = Sample(Prompt("of three"), 1, (0, 1), tuple(scenes))
    none = Sample(Prompt("seven77"), 2, (0, 2))
    latents = torch.randn(3, 4, 15, 2, 4, generator=torch.Generator().manual_seed(0))
    with ScoringThread(pipe.vae, rewards) as scoring:
        whole = scoring.submit(latents, [two, three, none], keep={two.key, three.key}).result()
        window = scoring.submit(latents[:2], [two, two], past=Past(9, switch=Switch(6))).result()
    # 21 frames before latent frame 6, 24 to latent frame 12, 12 of the last three.
    assert whole.values["reward"].tolist() == pytest.approx(
        [(21 * 4 + 36 * 8) / 57, (21 * 4 + 24 * 8 + 12 * 1) / 57, 7.0]
    )
    assert whole.values["echo/frames"].tolist() == pytest.approx(
        [(21 * 21 + 36 * 36) / 57, (21 * 21 + 24 * 24 + 12 * 12) / 57, 57.0]
    )
    assert window.values["reward"].tolist() == [8.0, 8.0] and window.values["echo/frames"].tolist() == [24.0, 24.0]
    # What is kept is decoded as one video is, and after a cut as another one.
    assert (whole.videos[two.key] - decode(pipe.vae, latents[:1])[0]).abs().max() < 1e-5
    cut, after = whole.videos[three.key], decode(pipe.vae, latents[1:2, :, 12:])[0]
    assert len(cut) == 57 and (cut[-9:] - after).abs().max() < 1e-5
    assert torch.equal(cut[45:49], cut[48:49].expand(4, -1, -1, -1))
    assert (cut[-9:] - decode(pipe.vae, latents[1:2])[0, -9:]).abs().max() > 1e-2


def decode(vae, latents):
    with torch.no_grad():
        return (decode_latents(vae, latents).float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@pytest.mark.parametrize(
    "past, cuts",
    # After a cut nothing is shared.
    [*((past, ()) for past in (Past(9), Past(9, shared=True), Past(3))), (Past(9), (6,)), (Past(9), (9,))],
)
@pytest.mark.parametrize("number", [1, 4, 9])
def test_the_frames_before_the_window(past, cuts, number):
    """As of the whole video, down to none at its beginning, over a cut too."""
    vae = tiny_pipeline(vae_num_res_blocks=0).vae
    latents = torch.randn(2, 4, 15, 2, 4, generator=torch.Generator().manual_seed(0))
    latents[1, :, : past.num_frames] = latents[0, :, : past.num_frames]
    whole = decode_videos(vae, latents, cuts=cuts)
    first = 4 * (past.num_frames - 1) + 1
    videos = decode_videos(vae, latents, past, cuts, number)
    assert videos.shape[1] == 57 - first + min(number, first)
    assert (videos - whole[:, first - min(number, first) :]).abs().max() < 1e-4


def test_rewards_see_what_was_before_their_frames():
    """Of a window, of the scenes of a video, and of its blocks; the watched rewards may look further back."""
    pipe, name = tiny_pipeline(**STEPS, vae_num_res_blocks=0), "tests.rewards.placed_rewards:Before"
    scenes = SampleScene("four"), SampleScene("eight888", Switch(6))
    sample = Sample(Prompt("of two"), 0, (0, 0), scenes)
    latents = torch.randn(1, 4, 12, 2, 4, generator=torch.Generator().manual_seed(0))
    frames = decode(pipe.vae, latents)[0]
    levels = (frames * 255).round().mean((1, 2, 3))

    def seen(end):
        values = levels[max(end - 3, 0) : end]
        return float(values @ 1000.0 ** torch.arange(len(values)).float())

    rewards = [RewardSet({name: 1.0}), RewardSet({"hard_cut": 1.0})]
    with ScoringThread(pipe.vae, *rewards) as scoring:
        window = scoring.submit(latents, [sample], True, [sample.key], Past(9, switch=Switch(6))).result()
        whole = scoring.submit(latents, [sample], block_frames=3).result()
    assert window.values[name].item() == pytest.approx(seen(33), rel=1e-4) and "hard_cut/jump" in window.values
    assert len(window.videos[sample.key]) == 12
    assert whole.values[name].item() == pytest.approx((21 * seen(0) + 24 * seen(21)) / 45, rel=1e-4)
    for number in (1, 2):
        value = whole.values[f"after_switch/new/{number}/{name}"].item()
        assert value == pytest.approx(seen(21 + 12 * (number - 1)), rel=1e-4)
