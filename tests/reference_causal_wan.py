"""Causal Wan written the slow way, as the yardstick of the tests.

Plain functions of a state dict (Diffusers parameter names): Python loops over layers and blocks, one attention call a
block, complex numbers for the rotary embedding and positions computed instead of looked up. Nothing is evicted: every
frame's unrotated keys and values are kept, and a block picks the frames that it may see. Runs in float64 unless told
otherwise, and is differentiable in the state dict.

`B` samples of `F` frames are computed together, `L` tokens of a frame are ordered row by row; kept keys and values are
Python lists of frames.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch


def warped_sigmas(sigmas, shift: float) -> np.ndarray:
    """shift * s / (1 + (shift - 1) * s) in float32, as published; timesteps are 1000 times these."""
    sigmas = np.asarray(sigmas, dtype=np.float32)
    return np.float32(shift) * sigmas / (1 + np.float32(shift - 1) * sigmas)


def published_noise(generator: torch.Generator, shape, block_frames: int, steps: list[int]):
    """`noise` and `renoise` of `sample`, for a video of `shape` [B, C, F, h, w], as the published samplers draw it.

    [B, F, C, h, w] at once, then for each block [B * f, C, h, w] after all of its `steps[block]` steps but the last.
    """
    batch_size, channels, num_frames, height, width = shape
    noise = torch.randn(batch_size, num_frames, channels, height, width, generator=generator)
    renoise = []
    for count in steps:
        draws = [
            torch.randn(batch_size * block_frames, channels, height, width, generator=generator)
            for _ in range(count - 1)
        ]
        renoise.append([draw.unflatten(0, (batch_size, block_frames)).transpose(1, 2) for draw in draws])
    return noise.transpose(1, 2), renoise


def sinusoid(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """[...] -> [..., dim] float64: cosines of t * 10000^(-i / (dim / 2)), then the sines."""
    half = dim // 2
    frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = timestep.to(torch.float64)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.cache
def rotation(head_dim: int, position: int, rows: int, columns: int) -> torch.Tensor:
    """[rows * columns, head_dim / 2] complex numbers of length 1: a frame's tokens at one position in time."""
    axis_dim = 2 * (head_dim // 6)
    dims = {"t": head_dim - 2 * axis_dim, "h": axis_dim, "w": axis_dim}
    angles = []
    for row in range(rows):
        for column in range(columns):
            place = {"t": position, "h": row, "w": column}
            angles.append([place[a] * 10000.0 ** (-2 * i / d) for a, d in dims.items() for i in range(d // 2)])
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


class KeptContext:
    """Unrotated keys and values of every clean frame so far: `layers[layer][frame] = (key, value)`."""

    def __init__(self, num_layers: int):
        self.layers = [[] for _ in range(num_layers)]
        self.sink_offset = 0  # absolute positions of the sink's keys, behind the frames' own
        # A sink that takes up what leaves: up to which frame it has; and as it has them, those run anew since.
        self.taken_before = 0
        self.taken = [{} for _ in range(num_layers)]

    @property
    def num_frames(self) -> int:
        return len(self.layers[0])


class ReferenceCausalWan:
    def __init__(self, state_dict: dict, config: dict, dtype: torch.dtype = torch.float64):
        self.weights = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
        self.dtype = dtype
        self.heads = config["num_attention_heads"]
        self.head_dim = config["attention_head_dim"]
        self.num_layers = config["num_layers"]
        self.freq_dim = config["freq_dim"]
        self.eps = config["eps"]
        self.cross_attn_norm = config["cross_attn_norm"]
        self.out_channels = config["out_channels"]
        self.patch = config["patch_size"][1]
        self.frames_per_block = config["num_frames_per_block"]
        self.sink = config["sink_size"]
        self.window = config["local_attn_size"]
        self.relative = config["rope_mode"] == "relative"
        self.rope_window = config.get("rope_window") or self.window
        self.sink_ema = config.get("sink_ema")  # decay with which the sink takes up what leaves the window
        self.past_weight = 1.0  # of the frames before a noisy block, the first one excepted

    # Which frames a block sees, and where their keys sit in time.

    def visible_frames(self, end: int) -> list[int]:
        """Frames that the block ending before frame `end` sees, its own frames included."""
        if self.window == -1 or end <= self.window:
            return list(range(end))
        first_recent = end - (self.window - self.sink)
        return [frame for frame in range(end) if frame < self.sink or frame >= first_recent]

    def key_position(self, frame: int, end: int, sink_offset: int = 0) -> int:
        if not self.relative and frame < self.sink:
            return frame + sink_offset
        if self.relative and self.window != -1 and frame < self.sink:
            return frame + max(end - self.rope_window, sink_offset)
        return frame

    def seen(self, frames, visible: list[int], end: int, context: KeptContext | None = None, layer: int = 0):
        """`{frame: (key, value)}`, unrotated, of the `visible` ones for the block ending before frame `end`."""
        seen = {j: frames[j] for j in visible}
        if self.sink_ema is None or self.window == -1:
            return seen
        first, leaving, taken = 0, end - (self.window - self.sink), {}
        if context is not None:
            first, leaving, taken = context.sink_offset, max(leaving, context.taken_before), context.taken[layer]
        for frame in range(first + self.sink, leaving):
            place = (frame - first) % self.sink
            if place in seen:
                pairs = zip(seen[place], taken.get(frame, frames[frame]))
                seen[place] = tuple(self.sink_ema * old + (1 - self.sink_ema) * new for old, new in pairs)
        return seen

    # Layers.

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def layer_norm(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.eps)

    def rms_norm(self, x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps) * self.weights[name + ".weight"]

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, self.head_dim))

    @staticmethod
    def silu(x):
        return x / (1 + torch.exp(-x))

    @staticmethod
    def gelu_tanh(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(self, query, key, value, weights=1.0):
        """[B, Lq, heads, D], [B, Lk, heads, D], [B, Lk, heads, D], weights [Lk] -> [B, Lq, heads * D]."""
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(self.head_dim)
        scores = torch.exp(scores - scores.amax(-1, keepdim=True)) * weights
        scores = scores / scores.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bkhd->bqhd", scores, value).flatten(2)

    def rotate(self, x, positions: list[int], rows: int, columns: int):
        """Rotary embedding of frames [B, F, rows * columns, heads, D], each at its position in time."""
        turn = torch.stack([rotation(self.head_dim, position, rows, columns) for position in positions])
        pairs = torch.view_as_complex(x.to(torch.float64).reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn[:, :, None]).flatten(-2).to(x.dtype)

    # Embeddings and head.

    def embed_frames(self, frames):
        """[B, C, F, H, W] -> tokens [B, F, H / p * W / p, dim]."""
        weight = self.weights["patch_embedding.weight"][:, :, 0]
        p = self.patch
        tokens = []
        for row in range(frames.shape[3] // p):
            for column in range(frames.shape[4] // p):
                patch = frames[:, :, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
                tokens.append(torch.einsum("bcfij,dcij->bfd", patch, weight))
        return torch.stack(tokens, dim=2) + self.weights["patch_embedding.bias"]

    def embed_time(self, timestep):
        """[B, F] -> embedding [B, F, dim] and modulation [B, F, 6, dim]."""
        name = "condition_embedder.time_embedder"
        embedding = self.linear(sinusoid(timestep, self.freq_dim).to(self.dtype), f"{name}.linear_1")
        embedding = self.linear(self.silu(embedding), f"{name}.linear_2")
        modulation = self.linear(self.silu(embedding), "condition_embedder.time_proj")
        return embedding, modulation.unflatten(-1, (6, -1))

    def embed_text(self, text):
        text = self.linear(text.to(self.dtype), "condition_embedder.text_embedder.linear_1")
        return self.linear(self.gelu_tanh(text), "condition_embedder.text_embedder.linear_2")

    def head(self, tokens, embedding, rows, columns):
        """[B, F, L, dim] -> [B, out_channels, F, H, W]."""
        shift, scale = (self.weights["scale_shift_table"] + embedding[:, :, None]).chunk(2, dim=2)
        values = self.linear(self.layer_norm(tokens) * (1 + scale) + shift, "proj_out")
        p = self.patch
        batch, num_frames = values.shape[:2]
        frames = values.new_zeros(batch, self.out_channels, num_frames, rows * p, columns * p)
        for row in range(rows):
            for column in range(columns):
                patch = values[:, :, row * columns + column].reshape(batch, num_frames, p, p, self.out_channels)
                patch = patch.permute(0, 4, 1, 2, 3)
                frames[:, :, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
        return frames

    # One transformer block, in three steps so that the callers decide what the self-attention sees.

    def self_attention_inputs(self, layer, tokens, modulation):
        """Unrotated query, key and value of frames, [B, F, L, heads, D]."""
        name = f"blocks.{layer}"
        table = self.weights[f"{name}.scale_shift_table"] + modulation
        x = self.layer_norm(tokens) * (1 + table[:, :, 1:2]) + table[:, :, 0:1]
        query = self.rms_norm(self.linear(x, f"{name}.attn1.to_q"), f"{name}.attn1.norm_q")
        key = self.rms_norm(self.linear(x, f"{name}.attn1.to_k"), f"{name}.attn1.norm_k")
        value = self.linear(x, f"{name}.attn1.to_v")
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def self_attention(self, query, start, keys_and_values, grid, past=range(0), sink_offset=0):
        """The query of a block from frame `start` on against `{frame: (key, value)}`.

        `past_weight` applies to the frames of `past`.
        """
        end = start + query.shape[1]
        query = self.rotate(query, list(range(start, end)), *grid)
        positions = [self.key_position(j, end, sink_offset) for j in keys_and_values]
        keys, values = (torch.stack(frames, dim=1) for frames in zip(*keys_and_values.values()))
        keys = self.rotate(keys, positions, *grid)
        weights = torch.tensor([self.past_weight if j in past else 1.0 for j in keys_and_values])
        weights = weights.repeat_interleave(keys.shape[2])
        attended = self.attention(query.flatten(1, 2), keys.flatten(1, 2), values.flatten(1, 2), weights)
        return attended.unflatten(1, query.shape[1:3])

    def rest_of_block(self, layer, tokens, attended, modulation, text):
        name = f"blocks.{layer}"
        table = self.weights[f"{name}.scale_shift_table"] + modulation
        tokens = tokens + table[:, :, 2:3] * self.linear(attended, f"{name}.attn1.to_out.0")

        x = tokens
        if self.cross_attn_norm:
            x = self.layer_norm(x) * self.weights[f"{name}.norm2.weight"] + self.weights[f"{name}.norm2.bias"]
        query = self.split_heads(self.rms_norm(self.linear(x, f"{name}.attn2.to_q"), f"{name}.attn2.norm_q"))
        key = self.split_heads(self.rms_norm(self.linear(text, f"{name}.attn2.to_k"), f"{name}.attn2.norm_k"))
        value = self.split_heads(self.linear(text, f"{name}.attn2.to_v"))
        attended = self.attention(query.flatten(1, 2), key, value).view_as(tokens)
        tokens = tokens + self.linear(attended, f"{name}.attn2.to_out.0")

        x = self.layer_norm(tokens) * (1 + table[:, :, 4:5]) + table[:, :, 3:4]
        x = self.linear(self.gelu_tanh(self.linear(x, f"{name}.ffn.net.0.proj")), f"{name}.ffn.net.2")
        return tokens + table[:, :, 5:6] * x

    # 1 and 2: a whole video in one pass, layer by layer.

    def forward(self, latents, timestep, text, clean=None):
        """Block-causal pass over all frames; `timestep` is [B] or [B, F].

        With `clean` latents (teacher forcing) a block sees the clean frames before it, run at t = 0, and itself.
        """
        num_frames, n = latents.shape[2], self.frames_per_block
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, num_frames)
        grid = (latents.shape[3] // self.patch, latents.shape[4] // self.patch)
        text = self.embed_text(text)

        halves = {"noisy": (latents.to(self.dtype), timestep)}
        if clean is not None:
            halves["clean"] = (clean.to(self.dtype), torch.zeros_like(timestep))
        context_half = "noisy" if clean is None else "clean"

        tokens = {half: self.embed_frames(x) for half, (x, _) in halves.items()}
        times = {half: self.embed_time(t) for half, (_, t) in halves.items()}
        for layer in range(self.num_layers):
            inputs = {half: self.self_attention_inputs(layer, tokens[half], times[half][1]) for half in halves}
            for half in halves:
                attended = []
                for start in range(0, num_frames, n):
                    frames = []
                    for j in range(start + n):
                        _, key, value = inputs[half if j >= start else context_half]
                        frames.append((key[:, j], value[:, j]))
                    seen = self.seen(frames, self.visible_frames(start + n), start + n)
                    query = inputs[half][0][:, start : start + n]
                    attended.append(self.self_attention(query, start, seen, grid))
                attended = torch.cat(attended, dim=1)
                tokens[half] = self.rest_of_block(layer, tokens[half], attended, times[half][1], text)
        return self.head(tokens["noisy"], times["noisy"][0], *grid)

    # 3: block after block, keeping every clean frame.

    def block(self, latents, timestep, text, context: KeptContext, store: bool, visible=None):
        """One block [B, C, f, H, W] after the frames in `context`; `store` appends its keys and values to it.

        It sees what the window shows, or the frames of `visible`.
        """
        start, num_frames = context.num_frames, latents.shape[2]
        end = start + num_frames
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, num_frames)
        grid = (latents.shape[3] // self.patch, latents.shape[4] // self.patch)
        text = self.embed_text(text)
        latents = latents.to(self.dtype)
        tokens = self.embed_frames(latents)
        embedding, modulation = self.embed_time(timestep)
        visible = self.visible_frames(end) if visible is None else visible
        past = range(0 if store else start)[1:]
        for layer in range(self.num_layers):
            query, key, value = self.self_attention_inputs(layer, tokens, modulation)
            new = list(zip(key.unbind(1), value.unbind(1)))
            everything = context.layers[layer] + new
            seen = self.seen(everything, visible, end, context, layer)
            attended = self.self_attention(query, start, seen, grid, past, context.sink_offset)
            tokens = self.rest_of_block(layer, tokens, attended, modulation, text)
            if store:
                context.layers[layer].extend((key.detach(), value.detach()) for key, value in new)
        return self.head(tokens, embedding, *grid)

    def context_of(self, clean, text) -> KeptContext:
        """The context after all blocks of `clean` [B, C, F, H, W] have been run at t = 0."""
        context = KeptContext(self.num_layers)
        zero = torch.zeros(clean.shape[0])
        with torch.no_grad():
            for start in range(0, clean.shape[2], self.frames_per_block):
                block = clean[:, :, start : start + self.frames_per_block]
                self.block(block, zero, text, context, store=True)
        return context

    def recache(self, video, text, context: KeptContext, global_sink: bool):
        """LongLive's change of prompt: the window's frames run anew in one pass, each seeing all others.

        `video` [B, C, F, H, W] are all clean frames, `context` what is kept of them; returns what takes its place.
        """
        total, zero = video.shape[2], torch.zeros(video.shape[0])
        first = 0 if self.window == -1 else max(total - self.window, 0)
        new = KeptContext(self.num_layers)
        if first == 0:
            self.block(video, zero, text, new, store=True, visible=list(range(total)))
            return new
        if global_sink:
            first += self.sink
            for kept, layer in zip(new.layers, context.layers):
                kept.extend(layer[:first])
            # What has left the window is in the sink as it was, and not a second time as it is now.
            new.sink_offset = context.sink_offset
            new.taken_before = total - (self.window - self.frames_per_block - self.sink)
            for layer, kept, taken in zip(context.layers, context.taken, new.taken):
                taken.update({frame: kept.get(frame, layer[frame]) for frame in range(new.taken_before)})
            seen = [*range(self.sink), *range(first, total)]
            self.block(video[:, :, first:], zero, text, new, store=True, visible=seen)
            return new
        for kept, layer in zip(new.layers, context.layers):
            kept.extend(layer[:first])
        self.block(video[:, :, first:], zero, text, new, store=True, visible=list(range(first, total)))
        for kept in new.layers:
            kept[: self.sink] = kept[first : first + self.sink]
        new.sink_offset = first
        return new

    def sample(
        self,
        noise,
        renoise,
        text,
        sigmas=(1.0, 0.75, 0.5, 0.25),
        shift=5.0,
        first_sigmas=None,
        original=None,
        encode_context=None,
        recache_at=None,
        global_sink=True,
        given=None,
        exact_levels=False,
    ):
        """The few-step sampler.

        `noise` [B, C, F, H, W] starts every block; `renoise[block][step]` [B, C, f, H, W] is the noise that takes the
        estimate of `step` to the next noise level (one less than there are steps). The first block may have other
        noise levels. With `original` a block starts from that, with noise (video to video). `encode_context` makes the
        clean frames before a block from all those generated; they are then run anew, in place of the kept ones.
        `text` may be a list with one for each block; before block `recache_at` the window is encoded with its text.
        `given` clean latents begin the video; `noise` and all that counts blocks is of those that are generated.
        Returns clean latents.
        """
        texts = text if isinstance(text, list) else [text] * noise.shape[2]
        table = warped_sigmas(1 - np.arange(1000) / 1000, shift)
        video = noise[:, :, :0].to(self.dtype) if given is None else given.to(self.dtype)
        context = self.context_of(video, texts[0])
        for index, x in enumerate(noise.to(self.dtype).split(self.frames_per_block, dim=2)):
            timesteps = np.float32(1000) * warped_sigmas(sigmas if index else first_sigmas or sigmas, shift)
            # Noise levels are looked up: t = 0 is not in the table, the nearest is 4.98. Or they are the timesteps'.
            levels = [float(table[abs(np.float32(1000) * table - t).argmin()]) for t in timesteps]
            levels = [float(t) / 1000 for t in timesteps] if exact_levels else levels
            if original is not None:
                x = (1 - levels[0]) * original[:, :, video.shape[2] :][:, :, : x.shape[2]] + levels[0] * x
            text = texts[index]
            if encode_context is not None and video.shape[2]:
                context = self.context_of(encode_context(video), texts[max(index - 1, 0)])
            if index == recache_at:
                context = self.recache(video, text, context, global_sink)
            for step, level in enumerate(levels):
                timestep = torch.full((x.shape[0],), float(timesteps[step]), dtype=torch.float64)
                x0 = x - level * self.block(x, timestep, text, context, store=False)
                if step + 1 < len(levels):
                    x = (1 - levels[step + 1]) * x0 + levels[step + 1] * renoise[index][step].to(self.dtype)
            if encode_context is None:
                self.block(x0, torch.zeros(x0.shape[0]), text, context, store=True)
            video = torch.cat([video, x0], dim=2)
        return video
