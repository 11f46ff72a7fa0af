"""The measurements, on the random tiny pipeline: what is measured, not how fast it is."""

import dataclasses

import pytest

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.benchmark import measure, measure_streams
from tests.tiny_pipeline import tiny_pipeline


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
    result = measure(tiny_pipeline(), repetitions=2, prompt="a [.75s] | b [1.5s]")
    assert all(value > 0 for name, value in dataclasses.asdict(result).items() if name != "gpu_memory")
    assert result.denoise > result.first_block + result.block and result.decode > result.decode_block
    # One to compile; then twice with decoding, twice without.
    assert streams == [3] * 5
    assert "first_frames" in str(result)


def test_streams_take_turns(streams):
    result = measure_streams(tiny_pipeline(), 3, num_frames=57)
    assert streams == [2, 5, 5, 5]
    # Twelve frames a block.
    assert result.frames_per_second == pytest.approx(12 / result.block)
