"""Transitions between scenes written the slow way: a list of frames with unrotated keys, as Infinity-RoPE keeps them.

What a block sees is picked from the list for every pass, and each frame's temporal row is written down: its place in
the list with relative positions, its index with absolute ones. Nothing is shifted afterwards.
"""

import numpy as np
import torch

from tests.reference_causal_wan import ReferenceCausalWan, warped_sigmas


NEWEST = 2
CUT_ROW = 45


class Frame:
    """A clean frame: its index in the video, and of each layer unrotated key and value `[B, L, heads, D]`."""

    def __init__(self, index: int, layers: list):
        self.index = index
        self.layers = layers


class SlowScenes:
    """Videos of `slow`, of any number of scenes. `memory` are the frames that it still has, in their order."""

    def __init__(self, slow: ReferenceCausalWan):
        self.slow = slow
        self.video = None
        self.memory: list[Frame] = []
        self.began = 0  # the index that the first frame of the memory would have if none had been left out
        self.passes = []  # of each: the indices it saw, and their rows; the block's own last

    def seen(self, num_new: int) -> list[Frame]:
        """What the window shows of the memory beside `num_new` frames."""
        window, sink = self.slow.window, self.slow.sink
        if window == -1 or len(self.memory) + num_new <= window:
            return self.memory
        num_recent = window - num_new - sink
        return self.memory[:sink] + (self.memory[-num_recent:] if num_recent else [])

    def run(self, latents, timestep: float, text, seen: list[Frame], start: int, cut=False, weighted=False):
        """The flow of frames from index `start` on that see `seen`, and themselves as [`Frame`]s."""
        slow, count = self.slow, latents.shape[2]
        if slow.relative:
            rows, own = list(range(len(seen))), CUT_ROW if cut else len(seen)
        else:
            rows, own = [frame.index for frame in seen], start + (CUT_ROW - len(seen) if cut else 0)
        own = list(range(own, own + count))
        self.passes.append(([frame.index for frame in seen], rows, own))
        grid = (latents.shape[3] // slow.patch, latents.shape[4] // slow.patch)
        text, tokens = slow.embed_text(text), slow.embed_frames(latents.to(slow.dtype))
        times = torch.full((latents.shape[0], count), float(timestep), dtype=torch.float64)
        embedding, modulation = slow.embed_time(times)
        frames = [Frame(start + i, []) for i in range(count)]
        for layer in range(slow.num_layers):
            query, key, value = slow.self_attention_inputs(layer, tokens, modulation)
            keys = torch.stack([frame.layers[layer][0] for frame in seen] + list(key.unbind(1)), dim=1)
            values = torch.stack([frame.layers[layer][1] for frame in seen] + list(value.unbind(1)), dim=1)
            query, keys = slow.rotate(query, own, *grid), slow.rotate(keys, rows + own, *grid)
            weights = torch.ones(len(rows + own))
            if weighted:
                weights[int(seen[:1] == self.memory[:1]) : len(seen)] = slow.past_weight
            weights = weights.repeat_interleave(keys.shape[2])
            attended = slow.attention(*(x.flatten(1, 2) for x in (query, keys, values)), weights)
            tokens = slow.rest_of_block(layer, tokens, attended.unflatten(1, query.shape[1:3]), modulation, text)
            for i, frame in enumerate(frames):
                frame.layers.append((key[:, i], value[:, i]))
        return slow.head(tokens, embedding, *grid), frames

    def flush(self):
        seen, total = self.seen(self.slow.frames_per_block), self.video.shape[2]
        by_index = {frame.index: frame for frame in seen[1:]}
        newest = []
        for index in range(total - 1, total - 1 - NEWEST, -1):
            if index not in by_index:
                break
            newest.insert(0, by_index[index])
        self.memory = seen[:1] + newest
        self.began = total - len(self.memory)

    def recache(self, text, global_sink: bool):
        window, total = self.slow.window, self.video.shape[2]
        kept = []
        if window != -1 and total - self.began > window:
            if global_sink:
                kept = self.memory[: self.slow.sink]
            first = total - window + len(kept)
        elif self.memory[0].index < self.began:
            # Of the frame that a flush has kept nothing is encoded anew: it stays as it is, or goes.
            if global_sink and self.seen(self.slow.frames_per_block)[0] is self.memory[0]:
                kept = self.memory[:1]
            first = self.began + 1
        else:
            first = self.began
        _, frames = self.run(self.video[:, :, first:], 0, text, kept, first)
        self.memory, self.began = kept + frames, self.began if kept else first

    @torch.no_grad()
    def sample(self, noise, renoise, texts, transitions, sigmas, shift=5.0):
        """Clean latents. `texts` has one a block, `transitions` the names of those of some blocks; `recache all`
        leaves no sink. Otherwise as `ReferenceCausalWan.sample`."""
        timesteps = np.float32(1000) * warped_sigmas(sigmas, shift)
        n, self.video = self.slow.frames_per_block, noise[:, :, :0].to(self.slow.dtype)
        for index, x in enumerate(noise.to(self.slow.dtype).split(n, dim=2)):
            transition, text = transitions.get(index, "roll"), texts[index]
            if transition in ("flush", "rope_cut"):
                self.flush()
            elif transition.startswith("recache"):
                self.recache(text, global_sink=transition == "recache")
            seen, start, cut = self.seen(n), index * n, transition == "rope_cut"
            for step, t in enumerate(timesteps):
                flow, _ = self.run(x, t, text, seen, start, cut, weighted=True)
                x = x - float(t) / 1000 * flow
                if step + 1 < len(timesteps):
                    level = float(timesteps[step + 1]) / 1000
                    x = (1 - level) * x + level * renoise[index][step].to(x.dtype)
            _, frames = self.run(x, 0, text, seen, start, cut)
            self.memory, self.video = self.memory + frames, torch.cat([self.video, x], dim=2)
            if self.slow.window != -1:
                recent = self.memory[self.slow.sink :][-(self.slow.window - self.slow.sink) :]
                self.memory = self.memory[: self.slow.sink] + recent
        return self.video
