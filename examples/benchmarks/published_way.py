"""The yardstick of `--baseline`: the same videos, computed the way the published code computes them.

Self-Forcing, Causal-Forcing, LongLive and Krea's server share one way of writing a causal Wan model. This is that way,
written anew in plain eager PyTorch on the weights of one of our pipelines, and on its own: what becomes faster in the
package does not become faster here. What it does, and where it is kinder than the originals, so that nobody has to
read them:

- A layer's keys and values lie in a buffer of the whole window, the current block included. Every pass writes them; in
  a full buffer the frames behind the sink are cloned and moved first. How full it is, tensors on the device say, which
  are read for every layer. (LongLive copies its whole buffer in every pass and joins sink and window anew; not here.)
- Positions are rotated as complex float64 numbers, for every sample by itself, with a table put together for every
  layer's queries and keys. With `rope_mode="relative"` the buffer keeps what is not rotated, and all of it is rotated
  in every pass.
- The text goes through its two linear layers in every pass. The keys and values made of it are kept, as published.
- Everything is in the model's dtype: norms and modulation, too. (Ours keeps these in float32.)
- A block is four steps, or as many as the pipeline has, and one pass that writes what is clean, also after the last
  block. Krea's has none, but a pass of the context before every block.
- The noise level of a step is looked up in a table of 1000, the clean latents are computed in float64.
- Attention is torch's, with the kernel that is asked for. (The originals call flash-attn, and build the lengths of its
  sequences anew for every call; not here.)
- The autoencoder is diffusers', with its weights as they are loaded, channels first; it decodes one latent frame a
  call, with its list of caches, and joins the video anew after each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel


TABLE_SIZE = 1000  # noise levels of the samplers

# Of queries, keys and values, `(B, L, heads, head_dim)` each, as what comes of them.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Buffer:
    """What a layer remembers: `(B, tokens, heads, head_dim)`, and how many tokens came and how many are held."""

    key: torch.Tensor
    value: torch.Tensor
    num_seen: torch.Tensor
    num_held: torch.Tensor
    text: tuple[torch.Tensor, torch.Tensor] | None = None


class PublishedAttention:
    """The projections of one attention, with the linear layers of ours, which have the LoRAs beside them, if any."""

    def __init__(self, attention: nn.Module, kernel: SDPBackend | None):
        self.heads, self.eps, self.kernel = attention.heads, attention.norm_q.eps, kernel
        self.q, self.k, self.v, self.out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
        self.norm_q, self.norm_k = attention.norm_q.weight, attention.norm_k.weight

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self._heads(self._rms_norm(self.q(x), self.norm_q))

    def key_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._heads(self._rms_norm(self.k(x), self.norm_k)), self._heads(self.v(x))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        if self.kernel is None:
            output = F.scaled_dot_product_attention(*inputs)
        else:
            with sdpa_kernel(self.kernel):
                output = F.scaled_dot_product_attention(*inputs)
        return self.out(output.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1))

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)).type_as(x) * weight


class PublishedLayer:
    def __init__(self, block: nn.Module, model: "PublishedTransformer", kernel: SDPBackend | None):
        self.model, self.eps, dtype = model, block.norm1.eps, model.dtype
        self.modulation = block.scale_shift_table.to(dtype).unsqueeze(0)  # (1, 1, 6, dim)
        self.self_attention = PublishedAttention(block.attn1, kernel)
        self.cross_attention = PublishedAttention(block.attn2, kernel)
        norm = block.norm2 if isinstance(block.norm2, nn.LayerNorm) else None
        self.cross_norm = norm and tuple(weight.to(dtype) for weight in (norm.weight, norm.bias))
        self.ffn = block.ffn.net[0].proj, block.ffn.net[2]

    def __call__(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        text: torch.Tensor,
        past: Buffer | Attend,
        grid: tuple[int, int, int],
        start: int,
    ) -> torch.Tensor:
        """Tokens `(B, L, dim)` through the layer; `e` `(B, F, 6, dim)` is of the time, `text` `(B, tokens, dim)`. The
        `grid` is frames, rows and columns, the first frame's index is `start`. A block has a buffer as its past, a
        whole clip has the attention in which its blocks see one another."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + e).chunk(6, dim=2)
        frames = (e.shape[1], -1)

        y = (self._norm(x).unflatten(1, frames) * (1 + scale) + shift).flatten(1, 2)
        if isinstance(past, Buffer):
            y = self._attend_to_past(y, past, grid, start)
            if past.text is None:
                past.text = self.cross_attention.key_value(text)
            key_value = past.text
        else:
            y = self._attend_in_clip(y, past, grid)
            key_value = self.cross_attention.key_value(text)
        x = x + (y.unflatten(1, frames) * gate).flatten(1, 2)

        y = x if self.cross_norm is None else self._norm(x, *self.cross_norm)
        x = x + self.cross_attention.attend(self.cross_attention.query(y), *key_value)

        y = (self._norm(x).unflatten(1, frames) * (1 + ffn_scale) + ffn_shift).flatten(1, 2)
        y = self.ffn[1](F.gelu(self.ffn[0](y), approximate="tanh"))
        return x + (y.unflatten(1, frames) * ffn_gate).flatten(1, 2)

    def _norm(self, x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *affine, eps=self.eps).type_as(x)

    def _attend_in_clip(self, x: torch.Tensor, attend: Attend, grid: tuple[int, int, int]) -> torch.Tensor:
        query, (key, value) = self.self_attention.query(x), self.self_attention.key_value(x)
        query, key = self.model.rotate(query, grid, 0), self.model.rotate(key, grid, 0)
        return self.self_attention.out(attend(query, key, value).flatten(2))

    def _attend_to_past(self, x: torch.Tensor, buffer: Buffer, grid: tuple[int, int, int], start: int) -> torch.Tensor:
        model = self.model
        query, (key, value) = self.self_attention.query(x), self.self_attention.key_value(x)
        if not model.relative:
            query, key = model.rotate(query, grid, start), model.rotate(key, grid, start)
        frame_tokens, num_new = grid[1] * grid[2], x.shape[1]
        stop = start * frame_tokens + num_new
        num_held = int(buffer.num_held) + stop - int(buffer.num_seen)
        num_lost = num_held - buffer.key.shape[1]
        if num_lost > 0:
            sink = model.sink_size * frame_tokens
            for kept in (buffer.key, buffer.value):
                if model.sink_ema is not None:
                    # Reward Forcing: keys that are not rotated, and a sink as long as what is lost.
                    lost = kept[:, sink : sink + num_lost]
                    kept[:, :sink] = model.sink_ema * kept[:, :sink] + (1 - model.sink_ema) * lost
                kept[:, sink : kept.shape[1] - num_lost] = kept[:, sink + num_lost :].clone()
            num_held -= num_lost
        buffer.key[:, num_held - num_new : num_held] = key
        buffer.value[:, num_held - num_new : num_held] = value
        buffer.num_seen.fill_(stop)
        buffer.num_held.fill_(num_held)
        key, value = buffer.key[:, :num_held], buffer.value[:, :num_held]
        if model.relative:
            held = num_held // frame_tokens
            # With more positions than the window has frames, between the sink and what follows it.
            gap = max(min(start + grid[0], model.rope_window) - held, 0)
            query = model.rotate(query, grid, gap + held - grid[0])
            if gap:
                sink, rest = key.tensor_split([model.sink_size * frame_tokens], dim=1)
                sink = model.rotate(sink, (model.sink_size, *grid[1:]), 0)
                rest = model.rotate(rest, (held - model.sink_size, *grid[1:]), model.sink_size + gap)
                key = torch.cat([sink, rest], dim=1)
            else:
                key = model.rotate(key, (held, *grid[1:]), 0)
        return self.self_attention.attend(query, key, value)


class PublishedTransformer:
    """Predicts the flow of a block; latents are `(B, F, C, H, W)`, frames first as the originals have them."""

    def __init__(self, transformer: CausalWanTransformer3DModel, kernel: SDPBackend | None = None):
        config = transformer.config
        self.dtype, self.device = transformer.dtype, transformer.device
        self.patch, self.freq_dim, self.eps = config.patch_size, config.freq_dim, config.eps
        self.relative, self.sink_size = config.rope_mode == "relative", config.sink_size
        self.sink_ema = config.sink_ema
        self.window, self.rope_window = config.local_attn_size, config.rope_window or 0
        self.heads, self.head_dim = config.num_attention_heads, config.attention_head_dim
        self.layers = [PublishedLayer(block, self, kernel) for block in transformer.blocks]
        embedder = transformer.condition_embedder
        self.patch_embedding = transformer.patch_embedding.weight, transformer.patch_embedding.bias
        time, text = embedder.time_embedder, embedder.text_embedder
        self.time, self.text = (
            [tuple(weight.to(self.dtype) for weight in (layer.weight, layer.bias)) for layer in layers]
            for layers in ((time.linear_1, time.linear_2, embedder.time_proj), (text.linear_1, text.linear_2))
        )
        self.modulation = transformer.scale_shift_table.to(self.dtype).unsqueeze(0)  # (1, 1, 2, dim)
        self.head = transformer.proj_out.weight, transformer.proj_out.bias
        pairs = self.head_dim // 2
        self.axes = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]  # of time, height and width
        positions = torch.arange(config.rope_max_seq_len, dtype=torch.float64)
        angles = [positions[:, None] / 10000 ** (torch.arange(n, dtype=torch.float64) / n) for n in self.axes]
        angles = torch.cat(angles, dim=1).to(self.device)
        self.rotations = torch.polar(torch.ones_like(angles), angles)  # (positions, pairs), complex128

    def new_buffers(self, batch_size: int, max_frames: int, frame_tokens: int) -> list[Buffer]:
        """Empty ones, of the window or, if that is unlimited, of a video of `max_frames`."""
        num_tokens = (max_frames if self.window == -1 else self.window) * frame_tokens
        shape = (batch_size, num_tokens, self.heads, self.head_dim)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(shape, dtype=dtype, device=self.device), torch.zeros(
                shape, dtype=dtype, device=self.device
            )

        return [Buffer(*zeros(shape, self.dtype), *zeros((1,), torch.int64)) for _ in self.layers]

    def rotate(self, x: torch.Tensor, grid: tuple[int, int, int], start: int) -> torch.Tensor:
        """`(B, L, heads, head_dim)`, whose first frame is at position `start`; `grid` is frames, rows, columns."""
        frames, rows, columns = grid
        time, height, width = self.rotations.split(self.axes, dim=1)
        rotated = []
        for sample in x:
            pairs = torch.view_as_complex(sample.to(torch.float64).unflatten(-1, (-1, 2)))
            turns = torch.cat(
                [
                    time[start : start + frames].view(frames, 1, 1, -1).expand(frames, rows, columns, -1),
                    height[:rows].view(1, rows, 1, -1).expand(frames, rows, columns, -1),
                    width[:columns].view(1, 1, columns, -1).expand(frames, rows, columns, -1),
                ],
                dim=-1,
            ).flatten(0, 2)
            rotated.append(torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(2))
        return torch.stack(rotated).type_as(x)

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        pasts: Sequence[Buffer | Attend],
        start: int,
    ) -> torch.Tensor:
        """The flow, shaped as `latents`, of a block whose first latent frame is `start`. `timestep` is `(B, F)`,
        `text` `(B, tokens, text_dim)`, `pasts` are the layers'. With gradients all layers are checkpointed."""
        patches = F.conv3d(latents.transpose(1, 2), *self.patch_embedding, stride=self.patch)
        grid = tuple(patches.shape[2:])
        x = patches.flatten(2).transpose(1, 2)

        half = self.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=self.device) / half)
        angles = timestep.flatten().to(torch.float64)[:, None] * frequencies
        e = F.linear(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.dtype), *self.time[0])
        e = F.linear(F.silu(e), *self.time[1])
        of_layers = F.linear(F.silu(e), *self.time[2]).unflatten(0, timestep.shape).unflatten(2, (6, -1))
        e = e.unflatten(0, timestep.shape)
        text = F.linear(F.gelu(F.linear(text, *self.text[0]), approximate="tanh"), *self.text[1])

        for layer, past in zip(self.layers, pasts):
            args = x, of_layers, text, past, grid, start
            x = checkpoint(layer, *args, use_reentrant=False) if torch.is_grad_enabled() else layer(*args)

        shift, scale = (self.modulation + e.unsqueeze(2)).chunk(2, dim=2)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps).type_as(x).unflatten(1, (grid[0], -1)) * (1 + scale) + shift
        x = F.linear(x.flatten(1, 2), *self.head)
        flows = []
        for sample in x:
            sample = torch.einsum("fhwpqrc->fpchqwr", sample.view(*grid, *self.patch, -1))
            flows.append(sample.flatten(5, 6).flatten(3, 4).flatten(0, 1))
        return torch.stack(flows)


class PublishedDecoder:
    """diffusers' decoder on contiguous weights of its own: ours may have been laid out otherwise."""

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = AutoencoderKLWan.from_config(vae.config).eval().requires_grad_(False)
        nn.Module.to(self.vae, vae.device, vae.dtype)  # the class's own warns of modules that it does not have
        self.vae.load_state_dict(vae.state_dict())
        stats = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device, dtype=vae.dtype)
        self.mean, self.std = stats.view(2, 1, -1, 1, 1, 1)
        self.reset()

    def reset(self):
        self.features = [None] * self.vae._cached_conv_counts["decoder"]
        self.is_first = True

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The frames `(B, 3, F, H, W)` in [-1, 1] of the next latents `(B, C, f, h, w)`."""
        hidden_states = self.vae.post_quant_conv(latents.to(self.vae.dtype) * self.std + self.mean)
        video = None
        for i in range(latents.shape[2]):
            frames = self.vae.decoder(
                hidden_states[:, :, i : i + 1], feat_cache=self.features, feat_idx=[0], first_chunk=self.is_first
            )
            video = frames if video is None else torch.cat([video, frames], dim=2)
            self.is_first = False
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def encode(self, frame: torch.Tensor) -> torch.Tensor:
        """The normalised latent `(B, C, 1, h, w)` of one frame `(B, 3, 1, H, W)`."""
        return (self.vae.encode(frame.to(self.vae.dtype)).latent_dist.mode() - self.mean) / self.std


class PublishedWay:
    """
    The sampler. For the same noise the videos are those of the pipeline, up to rounding.

    Args:
        pipe: whose weights and settings it takes, with the LoRA that is active. The autoencoder's are copied.
        kernel: of torch's attention; torch's choice by default.
    """

    def __init__(self, pipe: CausalWanPipeline, kernel: SDPBackend | None = None):
        if pipe.config.past_weight != 1:
            raise ValueError("the published code has no `past_weight`.")
        self.config, self.transformer = pipe.config, PublishedTransformer(pipe.transformer, kernel)
        self.decoder = PublishedDecoder(pipe.vae)
        config = pipe.transformer.config
        self.block_frames, self.channels = config.num_frames_per_block, config.in_channels
        self.scale = pipe.vae.config.scale_factor_spatial
        self.time_scale = pipe.vae.config.scale_factor_temporal
        shift = pipe.scheduler.config.shift
        clear = 1 - torch.arange(TABLE_SIZE, dtype=torch.float64) / TABLE_SIZE
        self.levels = (shift * clear / (1 + (shift - 1) * clear)).to(self.transformer.device)
        # A level of 0 is t = 0, for which the table has its last entry.
        self.times, self.first_times = (
            [TABLE_SIZE * shift * level / (1 + (shift - 1) * level) for level in levels]
            for levels in (pipe.config.sigmas, pipe.config.first_block_sigmas or pipe.config.sigmas)
        )

    def blocks(
        self,
        prompt_embeds: torch.Tensor,
        num_frames: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        decode: bool = False,
    ) -> Iterator[torch.Tensor]:
        """
        The video's blocks, latents `(B, C, f, h, w)`, or with `decode` their frames `(B, 3, F, H, W)` in [-1, 1].

        Sizes are in pixels and frames, `prompt_embeds` `(B, tokens, text_dim)`. Noise is drawn as the pipeline draws
        it.
        """
        with torch.no_grad():
            yield from self._blocks(prompt_embeds, num_frames, (height, width), generator, decode)

    def whole(self, blocks: Iterable[torch.Tensor]) -> torch.Tensor:
        """The frames of latent blocks, decoded in one go."""
        with torch.no_grad():
            self.decoder.reset()
            frames = self.decoder.decode(torch.cat(list(blocks), dim=2))
            self.decoder.reset()  # which frees what it remembers
            return frames

    def _blocks(self, text, num_frames, size, generator, decode) -> Iterator[torch.Tensor]:
        transformer, n, num_context = self.transformer, self.block_frames, self.config.num_context_frames
        self.decoder.reset()
        text, batch_size, num_latents = text.to(transformer.dtype), len(text), (num_frames - 1) // self.time_scale + 1
        height, width = (pixels // self.scale for pixels in size)
        frame_tokens = (height // transformer.patch[1]) * (width // transformer.patch[2])
        shape = (batch_size, num_latents, self.channels, height, width)
        noise = self._randn(shape, generator)
        capacity = num_context + n if num_context else num_latents
        buffers = transformer.new_buffers(batch_size, capacity, frame_tokens)
        clean = torch.zeros(batch_size, n, dtype=torch.float32, device=transformer.device)  # t = 0
        latents, frames = noise[:, :0], None
        for first in range(0, num_latents, n):
            start = first
            if num_context and first:
                context = self._context(latents, frames, num_context)
                start = context.shape[1]
                for buffer in buffers:
                    for tensor in (buffer.key, buffer.value, buffer.num_seen, buffer.num_held):
                        tensor.zero_()
                for place in range(0, start, n):
                    block = context[:, place : place + n]
                    transformer(block, clean[:, : block.shape[1]], text, buffers, place)
            x = noise[:, first : first + n]
            times = self.times if first else self.first_times
            for i, time in enumerate(times):
                timestep = clean + time
                x0 = self._without_noise(x, transformer(x, timestep, text, buffers, start), timestep)
                if i + 1 < len(times):
                    x = self._with_noise(x0, timestep - time + times[i + 1], generator)
            if not num_context:
                transformer(x0, clean, text, buffers, start)
            block = x0.transpose(1, 2)
            if decode or num_context:
                pixels = self.decoder.decode(block)
            if num_context:  # no more of the past is looked at
                latents = torch.cat([latents, x0], dim=1) if first else x0
                frames = pixels if frames is None else torch.cat([frames, pixels], dim=2)
                frames = frames[:, :, -(1 + self.time_scale * (num_context - 1)) :]
            yield pixels if decode else block

    def _context(self, latents: torch.Tensor, frames: torch.Tensor, num_context: int) -> torch.Tensor:
        """Krea's: the last latents, of which the first is encoded anew as a first frame, once there are older ones."""
        first = latents[:, :1]
        if latents.shape[1] > self.block_frames:
            first = self.decoder.encode(frames[:, :, :1]).transpose(1, 2).to(latents.dtype)
        return torch.cat([first, latents[:, -num_context:][:, 1:]], dim=1)

    def _randn(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        device = self.transformer.device
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else device)
        return noise.to(device, self.transformer.dtype)

    def _levels_at(self, timestep: torch.Tensor) -> torch.Tensor:
        """float64, `(B * F, 1, 1, 1)`: the nearest of the table."""
        distance = (self.levels * TABLE_SIZE - timestep.flatten()[:, None]).abs()
        return self.levels[distance.argmin(dim=1)].view(-1, 1, 1, 1)

    def _without_noise(self, x: torch.Tensor, flow: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        clean = x.flatten(0, 1).double() - self._levels_at(timestep) * flow.flatten(0, 1).double()
        return clean.to(x.dtype).view_as(x)

    def _with_noise(self, x0: torch.Tensor, timestep: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        flat, level = x0.flatten(0, 1), self._levels_at(timestep).float()
        noise = self._randn(flat.shape, generator)
        return ((1 - level) * flat + level * noise).to(x0.dtype).view_as(x0)
