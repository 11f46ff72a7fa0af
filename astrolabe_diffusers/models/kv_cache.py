"""K/V cache of a block-wise causal video transformer."""

import math
import weakref

import torch

from .rotary import Rotary, apply_rotary


class CausalWanKVLayerCache:
    """Keys and values of one transformer layer, shapes `(batch, tokens, heads, head_dim)`.

    One buffer per tensor holds `capacity` frame slots followed by a workspace of one block. Slots fill from the right,
    so that the frames in use and the workspace always form one contiguous slice: attention reads cache and current
    block without a copy, whatever the fill level. The workspace is scratch for the block being denoised; slots only
    ever receive what [`store`] is given.
    """

    def __init__(self, cache: "CausalWanKVCache"):
        # Weak: a cycle would keep gigabytes until the garbage collector comes by.
        self._cache = weakref.proxy(cache)
        self.clear()

    def clear(self):
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.text_key: torch.Tensor | None = None
        self.text_value: torch.Tensor | None = None
        # Relative positions only: the sink keys as first stored, and the shift (in frames) that `key` has them at.
        self._sink_key: torch.Tensor | None = None
        self._sink_shift = 0

    def shared(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values `(1, tokens, heads, head_dim)` that all videos see beside those of [`extend`]."""
        return None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached keys and values followed by those of the current block.

        Without grad the block goes to the workspace and views are returned: use them before the next call. With grad
        the result is a new tensor, and the cached part is a constant.
        """
        if self.key is None:
            return key, value
        cache = self._cache
        end = cache.capacity * cache.frame_tokens
        start = end - cache.num_cached * cache.frame_tokens
        stop = end + key.shape[1]
        if torch.is_grad_enabled() or stop > self.key.shape[1]:
            return torch.cat([self.key[:, start:end], key], dim=1), torch.cat([self.value[:, start:end], value], dim=1)
        self.key[:, end:stop] = key
        self.value[:, end:stop] = value
        return self.key[:, start:stop], self.value[:, start:stop]

    def store(self, key: torch.Tensor, value: torch.Tensor):
        """Keep a block's (clean) keys and values; the frames that leave the window are overwritten."""
        cache = self._cache
        size = cache.frame_tokens
        if self.key is None:
            tokens = (cache.capacity + cache.block_frames) * size
            self.key = key.new_empty(key.shape[0], tokens, *key.shape[2:])
            self.value = torch.empty_like(self.key)
        for i in range(key.shape[1] // size):
            slot = cache.slot(cache.num_frames + i)
            if slot is not None:
                # Slot 0 is the rightmost one.
                start = (cache.capacity - 1 - slot) * size
                self.key[:, start : start + size] = key[:, i * size : (i + 1) * size].detach()
                self.value[:, start : start + size] = value[:, i * size : (i + 1) * size].detach()

    def shift_sink(self, shift: int, rotary: Rotary):
        """Place the sink keys `shift` frames after their own positions; `rotary` is the rotation that does it."""
        if shift == self._sink_shift or self.key is None:
            return
        cache = self._cache
        end = cache.capacity * cache.frame_tokens
        sink = self.key[:, end - cache.sink_size * cache.frame_tokens : end]
        if self._sink_key is None:
            # Always rotate the original: rotating a rotated bf16 key again and again would drift.
            self._sink_key = sink.clone()
        sink.copy_(apply_rotary(self._sink_key, rotary))
        self._sink_shift = shift


class CausalWanKVCache:
    """Keys and values of the clean blocks generated so far, for every layer of a [`CausalWanTransformer3DModel`].

    A plain object that belongs to one generation: pass it to the transformer's `forward` together with
    `kv_cache_mode`. Each clean frame is written once, into a slot that never moves: the first `sink_size` frames stay
    for ever, the others form a ring of the size that the model's window leaves. Which slots are in use is plain Python
    arithmetic on the number of frames, so nothing here waits for the device. The order of the slots is not the order
    of time; attention does not depend on it, because positions are rotated into the keys.

    Args:
        num_layers (`int`): number of transformer layers.
        max_frames (`int`, *optional*):
            The longest video in latent frames. Required if the model's window is unlimited (`local_attn_size=-1`),
            and then an upper bound; ignored otherwise.
        past_weight (`float`, defaults to 1.0):
            Factor in (0, 1] of the attention that a noisy block pays to the frames before it, the video's first one
            excepted. Less than 1 keeps errors from piling up (Krea).
    """

    def __init__(self, num_layers: int, max_frames: int | None = None, past_weight: float = 1.0):
        self.max_frames = max_frames
        self.past_weight = past_weight
        self.num_frames = 0  # latent frames stored so far, those that left the window included
        self.num_cached = 0  # slots in use
        self.sink_start = 0  # the frame in the first sink slot
        self.capacity = self.sink_size = self.block_frames = self.frame_tokens = 0
        self._ring = True
        self._rewound = False
        self._shape: tuple[int, int, int] | None = None
        self._text: torch.Tensor | None = None
        self.layer_caches = [CausalWanKVLayerCache(self) for _ in range(num_layers)]

    def __len__(self) -> int:
        return len(self.layer_caches)

    def get(self, layer_idx: int) -> CausalWanKVLayerCache:
        return self.layer_caches[layer_idx]

    def clear(self):
        """Forget everything, text included, and free the memory."""
        self.num_frames = self.num_cached = self.sink_start = 0
        self._text = None
        for layer_cache in self.layer_caches:
            layer_cache.clear()

    def reset_text(self):
        """Forget the text keys and values. Only needed after the weights changed: new text is noticed by itself."""
        self._text = None
        for layer_cache in self.layer_caches:
            layer_cache.text_key = layer_cache.text_value = None

    def rewind(self, num_frames: int, keep_sink: bool):
        """Go back to `num_frames` frames, to write those after them anew, all at once.

        Of the frames before, only the sink stays, if `keep_sink`; if not, the next frames that are written become it.
        """
        self.num_frames = num_frames
        self.num_cached = self.sink_size if keep_sink else 0
        self._rewound = True
        if not keep_sink:
            self.sink_start = num_frames
            for layer_cache in self.layer_caches:
                layer_cache._sink_key, layer_cache._sink_shift = None, 0

    def advance(self, num_frames: int):
        """Count frames that every layer has stored."""
        self.num_frames += num_frames
        self.num_cached = min(self.num_cached + num_frames, self.capacity)
        self._rewound = False

    def select(self, videos: list[int]) -> "CausalWanKVCache":
        """A cache of its own for some videos of the batch."""
        other = CausalWanKVCache(len(self), self.max_frames, self.past_weight)
        for name, value in vars(self).items():
            if name not in ("layer_caches", "_text"):
                setattr(other, name, value)
        if self._shape is not None:
            other._shape = (len(videos), *self._shape[1:])
        for source, target in zip(self.layer_caches, other.layer_caches):
            for name in ("key", "value", "_sink_key"):
                tensor = getattr(source, name)
                setattr(target, name, None if tensor is None else tensor[videos])
            target._sink_shift = source._sink_shift
        return other

    def slot(self, frame: int) -> int | None:
        """The slot that keeps a latent frame, or `None` if no later block can see it."""
        frame -= self.sink_start
        if frame < self.capacity:
            return frame
        ring = self.capacity - self.sink_size
        return self.sink_size + (frame - self.sink_size) % ring if self._ring and ring > 0 else None

    def begin_block(self, frame_offset: int, num_frames: int, frame_tokens: int, shape: tuple[int, int, int], config):
        """Check a block against the cache and, before the first one, size the slots by the model's window."""
        if frame_offset != self.num_frames:
            raise ValueError(
                f"`frame_offset` must be {self.num_frames}, the number of latent frames in `kv_cache`, but is "
                f"{frame_offset}."
            )
        if self.num_frames == 0:
            self.frame_tokens, self._shape = frame_tokens, shape
            self.block_frames = config.num_frames_per_block
            self._ring = config.local_attn_size != -1
            self.sink_size = config.sink_size if self._ring else 0
            if not self._ring and self.max_frames is None:
                raise ValueError(
                    "the model's window is unlimited: state the longest video in latent frames, "
                    "`CausalWanKVCache(num_layers, max_frames=...)`."
                )
            # The current block is never read from a slot, and nothing follows the last block of a bounded video.
            longest = config.local_attn_size if self._ring else self.max_frames
            self.capacity = max(longest - self.block_frames, 0)
        elif shape != self._shape:
            raise ValueError(f"`kv_cache` serves batch, height and width {self._shape}, but this block has {shape}.")
        elif num_frames > self.block_frames and not self._rewound:
            raise ValueError(
                f"a block of {num_frames} latent frames cannot follow cached ones: the model's blocks have "
                f"{self.block_frames} at most."
            )
        if not self._ring and frame_offset + num_frames > self.max_frames:
            raise ValueError(
                f"latent frame {frame_offset + num_frames - 1} passes `max_frames={self.max_frames}` of `kv_cache`."
            )

    def attention_mask(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """What `past_weight` adds to the scores of the keys that a block of `num_tokens` sees, `(1, 1, 1, keys)`."""
        if self.past_weight == 1 or self.num_cached == 0:
            return None
        cached = self.num_cached * self.frame_tokens
        # The rightmost slot keeps the first frame until a ring without a sink takes it for another.
        keeps_first = self.num_frames - self.sink_start <= self.capacity or self.sink_size > 0
        past = cached - self.frame_tokens * keeps_first
        mask = torch.zeros(1, 1, 1, cached + num_tokens, device=device, dtype=dtype)
        mask[..., :past] = math.log(self.past_weight)
        return mask

    def has_text(self, encoder_hidden_states: torch.Tensor) -> bool:
        """Whether the text keys and values of exactly this tensor are cached; if not, forget those of another."""
        if self._text is not encoder_hidden_states:
            self.reset_text()
            self._text = encoder_hidden_states
            return False
        return self.layer_caches[-1].text_key is not None
