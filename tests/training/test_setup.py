import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from astrolabe_diffusers.training.errors import UserError
from astrolabe_diffusers.training.setup import accelerate_settings, check_precision, load_pipeline, set_recipe
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import config


def recipe(pipe):
    transformer, pipeline = pipe.transformer.config, pipe.config
    return transformer.local_attn_size, transformer.sink_size, pipeline.sigmas, pipeline.num_context_frames


def video(pipe):
    """Latents of three blocks."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_frames=33, generator=generator, output_type="latent").frames


def test_a_window_is_that_of_a_model_made_with_it():
    pipe = tiny_pipeline()
    before = video(pipe)
    set_recipe(pipe, config(local_attn_size=6, sink_size=3))
    after = video(pipe)
    assert torch.equal(after, video(tiny_pipeline(local_attn_size=6, sink_size=3)))
    assert torch.equal(after[:, :, :6], before[:, :, :6]) and not torch.equal(after[:, :, 6:], before[:, :, 6:])


def test_the_model_keeps_its_recipe_unless_told_otherwise():
    pipe = tiny_pipeline(local_attn_size=9, sink_size=3)
    set_recipe(pipe, config())
    assert recipe(pipe) == (9, 3, [1.0, 0.75, 0.5, 0.25], None)
    set_recipe(pipe, config(local_attn_size=6, sink_size=0, sigmas="1,0.5"))
    assert recipe(pipe) == (6, 0, [1.0, 0.5], None)


def test_a_server_s_recipe_is_trained_in_the_plain_loop():
    """And then generates what the plain pipeline does."""
    pipe = tiny_pipeline(num_context_frames=3, sigmas=[1.0, 0.5, 0.0])
    before = video(pipe)
    with pytest.raises(UserError, match="set num_context_frames=0"):
        set_recipe(pipe, config())
    set_recipe(pipe, config(num_context_frames=0, sigmas=[1.0, 0.75, 0.5, 0.25]))
    assert recipe(pipe) == recipe(tiny_pipeline())
    assert torch.equal(video(pipe), video(tiny_pipeline())) and not torch.equal(video(pipe), before)


def test_a_window_needs_room():
    with pytest.raises(UserError, match="local_attn_size=3 has no room for the sink of 3 and a block of 3"):
        set_recipe(tiny_pipeline(), config(local_attn_size=3, sink_size=3))


@pytest.fixture
def launched(monkeypatch):
    """Makes an Accelerator as under a launcher that sets this variable."""

    def make(name, value):
        monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        with accelerate_settings():
            check_precision(Accelerator())

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "rubbish", "must be one of no, bf16, not rubbish"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "must be one of no, bf16, not fp16"),
        ("ACCELERATE_USE_CPU", "maybe", "invalid truth value maybe"),
    ],
)
def test_what_a_launcher_got_wrong(launched, name, value, words):
    with pytest.raises(UserError, match=words) as error:
        launched(name, value)
    assert "\n" not in str(error.value)


def test_loading_is_silent(model_folder, capfd):
    pipe = load_pipeline(str(model_folder), Accelerator(cpu=True))
    assert pipe.transformer.config.num_layers == 2 and capfd.readouterr() == ("", "")
