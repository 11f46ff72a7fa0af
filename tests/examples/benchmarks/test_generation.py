"""The measurements, on the random tiny pipeline: what is measured, not how fast it is."""

import dataclasses

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.errors import UserError
from tests.tiny_pipeline import SMALL, tiny_pipeline


ONE_LAYER = {**SMALL, "num_layers": 1}


@pytest.fixture
def streams(monkeypatch):
    """The number of blocks that every stream has given, of the streams in the order they were made."""
    counts, make = [], CausalWanPipeline.stream

    def stream(*args, **kwargs):
        counts.append(0)
        blocks, index = make(*args, **kwargs), len(counts) - 1
        take = blocks.__class__.__next__

        class Counted(blocks.__class__):
            def __next__(self):
                piece = take(self)
                counts[index] += 1
                return piece

        blocks.__class__ = Counted
        return blocks

    monkeypatch.setattr(CausalWanPipeline, "stream", stream)
    return counts


def test_parts_add_up(streams):
    from generation import measure

    result = measure(tiny_pipeline(**ONE_LAYER), repetitions=2, prompt="a [.75s] | b [1.5s]")
    assert all(value > 0 for name, value in dataclasses.asdict(result).items() if name != "gpu_memory")
    assert result.denoise > result.first_block + result.block and result.decode > result.decode_block
    # One to compile; then twice with decoding, twice without.
    assert streams == [3] * 5


def test_streams_take_turns(streams):
    from generation import measure_streams

    result = measure_streams(tiny_pipeline(**ONE_LAYER), 3, prompt="a", num_frames=57)
    assert streams == [2, 5, 5, 5]
    # Twelve frames a block.
    assert result.frames_per_second == pytest.approx(12 / result.block)


def test_a_folder_or_a_recipe(model_folder, monkeypatch, tmp_path, capsys):
    import generation

    sizes = ["--num_frames", "9", "--height", "16", "--width", "32", "--repetitions", "1", "--device", "cpu"]
    for flag in ("--model", "--pipeline"):
        result = generation.main([flag, str(model_folder), "--dtype", "float32", *sizes])
        assert f"first_frames {result.first_frames:.3f}  " in capsys.readouterr().out and result.decode > 0
    # A published model is a recipe, also under the flag that it once had; a folder of its name is the folder.
    monkeypatch.setattr(generation, "random_pipeline", lambda recipe, *_: print(recipe) or tiny_pipeline(**ONE_LAYER))
    for flag in ("--recipe", "--model"):
        generation.main([flag, "longlive", *sizes])
        assert capsys.readouterr().out.startswith("longlive\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "longlive").symlink_to(model_folder)
    generation.main(["--model", "longlive", "--dtype", "float32", *sizes])
    assert not capsys.readouterr().out.startswith("longlive")
    with pytest.raises(UserError, match="there is no 'self-forcin'.*self-forcing"):
        generation.main(["--recipe", "self-forcin"])


def test_random_weights_are_of_the_recipe(monkeypatch):
    """At the width of a head; the configs are the published ones."""
    import random_models

    monkeypatch.setattr(random_models, "WAN_SIZES", {"1.3B": dict(num_attention_heads=1, num_layers=1, ffn_dim=8)})
    monkeypatch.setattr(random_models, "UMT5_XXL", dict(vocab_size=300, d_model=16, d_kv=4, d_ff=8, num_layers=1))
    monkeypatch.setattr(random_models, "AutoencoderKLWan", lambda: tiny_pipeline().vae)
    pipe = random_models.random_pipeline("longlive", "cpu")
    assert (pipe.transformer.config.sink_size, pipe.config.num_frames) == (3, 477)
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert pipe.transformer.scale_shift_table.dtype == torch.float32
    weight = pipe.transformer.blocks[0].attn1.to_q.weight.float()
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    assert all((p == 1).all() for name, p in pipe.transformer.named_parameters() if name.endswith("norm_q.weight"))
