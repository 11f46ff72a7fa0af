"""What takes minutes on the embedded model. `pytest tests -m slow -s` also prints the figures."""

import resource
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.rewards import get_reward


pytestmark = pytest.mark.slow


def load():
    pipe = DiffusionPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def different_captions(number):
    """Pairs of held-out captions, of one and two objects, that share neither colour, shape, background nor
    direction."""
    files = [Path(TINY_SHAPES) / "prompts" / folder / "test.txt" for folder in ("one_object", "two_objects")]
    captions = [line for file in files for line in file.read_text().splitlines()]
    words = [set(caption.split()) - {"a", "an", "and", "moves", "on", "background"} for caption in captions]
    pairs = [(a, b) for i, a in enumerate(captions) for j, b in enumerate(captions) if not words[i] & words[j]]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:number]
    return [pairs[i] for i in order]


def match_after_switch(pipe, pairs, transition, before=3, after=6):
    """Mean prompt match of each block with the old and with the new prompt, `(before + after, 2)`."""
    reward, scores = get_reward("tiny_shapes_prompt_match"), []
    for start in range(0, len(pairs), 16):
        old, new = ([pair[side] for pair in pairs[start : start + 16]] for side in (0, 1))
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(old))]
        num_frames = 12 * (before + after) - 3
        stream = pipe.stream(old, num_frames=num_frames, generator=generators, output_type="pt")
        rows = []
        for block in range(before + after):
            if block == before:
                stream.set_prompt(new, transition=transition)
            frames = next(stream)
            rows.append(torch.stack([reward.score(frames, prompts, [{}] * len(old)).scores for prompts in (old, new)]))
        scores.append(torch.stack(rows))
    return torch.cat(scores, dim=2).mean(2)


def test_the_video_follows_a_new_prompt():
    pipe, pairs = load(), different_captions(64)
    print("\nprompt match of each block with the old and the new prompt; the change is after three blocks")
    for transition in pipe.transitions:
        match = match_after_switch(pipe, pairs, transition)
        for name, column in zip(("old", "new"), match.T.tolist()):
            print(f"{transition:8} {name}  " + "  ".join(f"{value:.2f}" for value in column))
        # Unrelated captions share no attribute: chance alone gives little.
        assert match[2, 0] > 0.85 and match[2, 1] < 0.3 and match[-1, 0] < 0.3
        # After a cut the scene is new. Otherwise the cache holds pictures of the first one, the sink for ever.
        blocks = {"roll": 3, "recache": 2, "flush": 3, "rope_cut": 4, "cut": 1}[transition]
        assert match[2 + blocks :, 1].min() > 0.85


def test_ten_minutes():
    """600 s at 16 frames a second: memory stays flat, and pauses change nothing."""
    pipe = load()
    num_blocks = 800
    arguments = dict(prompt="a yellow circle moves down on a black background", num_frames=12 * num_blocks - 3)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    stream = pipe.stream(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt")
    sums, peaks, started = [], [], time.perf_counter()
    for frames in stream:
        sums.append(frames.double().sum().item())
        peaks.append(peak())
    seconds = time.perf_counter() - started
    memory = f"peak memory after 20 blocks {peaks[19]:.0f} MB, at the end {peaks[-1]:.0f} MB"
    print(f"\n{num_blocks} blocks in {seconds:.0f} s; {memory}")
    assert len(sums) == num_blocks and peaks[-1] - peaks[19] < 20

    # In pieces, with other work on the same pipeline between them.
    stream, pieces = pipe.stream(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt"), []
    for block in range(0, num_blocks, 100):
        pieces += [next(stream).double().sum().item() for _ in range(100)]
        pipe("a blue cross moves left on a gray background", num_frames=9)
    assert pieces == sums
