"""K/V cache of a block-wise causal video transformer."""

import copy
import math
from dataclasses import dataclass, replace

import torch

from .kv_cache_flush import CUT_ROW, FlushedKeys, kept_frames
from .rotary import CausalWanRotaryPosEmbed, Rotary, apply_rotary


KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BoundedSlots:
    """A slot for every frame of a video that has an end. Frames are counted from the one in slot 0."""

    capacity: int
    sink_size = 0

    def slot(self, frame: int) -> int | None:
        """The slot that keeps a frame, or `None` if no later block can see it."""
        return frame if frame < self.capacity else None

    def still_seen(self, num_frames: int, num_newer: int) -> list[int]:
        """The slots of `num_frames` frames that a block sees before which `num_newer` are kept elsewhere."""
        return list(range(min(num_frames, self.capacity)))


@dataclass(frozen=True)
class RingSlots:
    """The slots of a window: the first frames, the sink, stay for ever, and the others form a ring."""

    capacity: int
    sink_size: int

    def slot(self, frame: int) -> int | None:
        if frame < self.capacity:
            return frame
        ring = self.capacity - self.sink_size
        return self.sink_size + (frame - self.sink_size) % ring if ring else None

    def still_seen(self, num_frames: int, num_newer: int) -> list[int]:
        # The newer ones have pushed the oldest out of the window.
        num_left = min(num_frames, self.capacity - num_newer) - self.sink_size
        newest = range(num_frames - num_left, num_frames)
        return sorted([*range(self.sink_size), *(self.slot(frame) for frame in newest)])


@dataclass
class KVCacheState:
    """Where a cache keeps what, and how far it is. The cache and its layers hold the same one."""

    num_frames: int = 0  # stored so far, those that left the window included
    num_cached: int = 0  # slots in use
    first_frame: int = 0  # the frame in slot 0, or the one whose place that has since a flush
    first_shift: int = 0  # frames from its own place to that
    cut: bool = False  # the next block sees what is cached from afar
    slots: BoundedSlots | RingSlots = BoundedSlots(0)
    num_beside: int = 0  # frames of a memory bank, left of the slots in use
    margin_frames: int = 0  # in the layers' buffers, left of the slots; of a ring, from the first pair of blocks on
    block_frames: int = 0
    frame_tokens: int = 0
    shape: tuple[int, int, int] | None = None  # batch, and height and width of the latents
    rewound: bool = False  # the next block is what is written anew, all at once
    keeps_text: bool = False  # this pass takes the text's keys and values from the layers and leaves them there

    @property
    def end(self) -> int:
        """Tokens in the layers' buffers before the workspace."""
        return (self.margin_frames + self.slots.capacity) * self.frame_tokens

    def tokens(self, slot: int) -> slice:
        """The tokens of a slot in the layers' buffers. Slot 0 is the rightmost one."""
        start = self.end - (slot + 1) * self.frame_tokens
        return slice(start, start + self.frame_tokens)


def growing(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The same tensor, marked for torch.compile: the number of its tokens changes from block to block."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def new_buffer(like: torch.Tensor, batch_size: int, num_tokens: int) -> torch.Tensor:
    """Room for keys or values `(batch, tokens, heads, head_dim)`."""
    # One token in front: a view that begins where its memory does would be compiled for itself.
    return like.new_empty(batch_size, 1 + num_tokens, *like.shape[2:])[:, 1:]


class CausalWanKVLayerCache:
    """Keys and values of one transformer layer, shapes `(batch, tokens, heads, head_dim)`.

    One buffer per tensor holds the frame slots followed by a workspace of one block. Slots fill from the right, so
    that the frames in use and the workspace always form one contiguous slice: attention reads cache and current block
    without a copy, whatever the fill level. The workspace is scratch for the block being denoised; slots only ever
    receive clean blocks, by [`store`] or as the first of [`extend_pair`].

    A pair of blocks, a clean one and the one that follows it, is written at once, the clean one to its slots and the
    other to the workspace. While the slots fill, the clean block sees all but the workspace. Later it takes the slots
    of frames that leave the window, but not its own: it sees a copy of these in a margin, left of the slots.

        margin                         slots           workspace
        (sink)  frames that leave      ring     sink   second block
        |----- seen by the clean block -------------|
                                       |--- seen by the second one --|

    With relative positions the sink moves from block to block. Then the clean one sees a copy of that in the margin
    too, and not the slots'.

    [`extend`], [`extend_pair`] and [`store`] are what a compiled block calls: they see views and no number that grows
    with the video.
    """

    # Keys and values `(1, tokens, heads, head_dim)` that all videos see beside those of `extend`.
    past: KeyValue | None = None
    keeps_graph = False  # or what is stored with grad is no constant

    def __init__(self, state: KVCacheState):
        self.state = state
        self.text: KeyValue | None = None
        self.clear()

    def clear(self):
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        # What the current block sees of them, its workspace included if it has one.
        self._seen: KeyValue | None = None
        self._has_workspace = False
        # A pair: where its tokens go in what is seen, and how many of these only the first and the second block see.
        self._places: torch.Tensor | None = None
        self._only_first = self._only_second = 0
        self._stored: KeyValue | None = None
        self.forget_sink()

    def forget_sink(self):
        # Relative positions only: the sink keys as first stored, and the shift (in frames) that `key` has them at.
        self._sink_key: torch.Tensor | None = None
        self._sink_shift = 0
        self.flushed: FlushedKeys | None = None

    def select(self, videos: list[int], state: KVCacheState) -> "CausalWanKVLayerCache":
        """A layer of its own for some videos of the batch, without text."""
        other = type(self)(state)
        if self.key is not None:
            other.key, other.value = (new_buffer(x, len(videos), x.shape[1]) for x in (self.key, self.value))
            for row, video in enumerate(videos):
                other.key[row], other.value[row] = self.key[video], self.value[video]
        other._sink_key = None if self._sink_key is None else self._sink_key[videos]
        other._sink_shift = self._sink_shift
        other.flushed = self.flushed and self.flushed.select(videos)
        return other

    def go_on(self, state: KVCacheState, num_videos: int) -> "CausalWanKVLayerCache":
        """A layer for several videos that go on from this one's single video, without its frames."""
        return CausalWanKVLayerCache(state)

    def add_margin(self, num_tokens: int):
        """So many tokens before the slots."""
        if self.key is not None:
            for name in ("key", "value"):
                buffer = getattr(self, name)
                wider = new_buffer(buffer, len(buffer), num_tokens + buffer.shape[1])
                wider[:, num_tokens:] = buffer
                setattr(self, name, wider)

    def begin_block(self, num_tokens: int):
        if self.key is None:
            return
        state = self.state
        end = state.end
        start = end - (state.num_cached + state.num_beside) * state.frame_tokens
        self._has_workspace = not torch.is_grad_enabled() and end + num_tokens <= self.key.shape[1]
        stop = end + num_tokens if self._has_workspace else end
        self._seen = growing(self.key[:, start:stop]), growing(self.value[:, start:stop])

    def begin_text(self, encoder_hidden_states: torch.Tensor):
        """The text of the pass, embeddings as they are given to the transformer."""

    def needs_text_key(self, kv_cache_mode: str) -> bool:
        """Whether what a pass sees hangs on the text: [`see_text`] is then called before the layer attends."""
        return False

    def see_text(self, key: torch.Tensor):
        """The text's keys in this layer, `(batch, text tokens, heads, head_dim)`."""

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Cached keys and values followed by those of the current block.

        Without grad the block goes to the workspace and views are returned: use them before the next call. With grad
        the result is a new tensor, and the cached part is a constant.
        """
        if self._seen is None:
            return key, value
        seen_key, seen_value = self._seen
        if not self._has_workspace:
            return torch.cat([seen_key, key], dim=1), torch.cat([seen_value, value], dim=1)
        seen_key[:, -key.shape[1] :] = key
        seen_value[:, -key.shape[1] :] = value
        return seen_key, seen_value

    def begin_pair(self, seen: slice, places: torch.Tensor, leaving: torch.Tensor):
        """`seen` is a slice of the buffers, `places` are the pair's tokens in it; `leaving`, for the margin, are those
        tokens of the buffers that only the first block sees."""
        places, leaving = places.to(self.key.device), leaving.to(self.key.device)
        self._places, self._only_first = places, len(leaving)
        # As many as the first sees in the margin, the second does in the slots and the workspace.
        self._only_second = len(leaving) or len(places) // 2
        self._seen = growing(self.key[:, seen]), growing(self.value[:, seen])
        if self._only_first:
            for x, buffer in zip(self._seen, (self.key, self.value)):
                x[:, : self._only_first] = buffer.index_select(1, leaving)

    def extend_pair(self, key: torch.Tensor, value: torch.Tensor) -> tuple[KeyValue, KeyValue]:
        """Store the first, clean block of a pair `(batch, 2 * tokens, heads, dim)`. What the first sees and what the
        second sees, as views: use them before the next call."""
        if self._seen is None:
            clean = key.chunk(2, dim=1)[0], value.chunk(2, dim=1)[0]
            self.store(*clean)
            return clean, (key, value)
        seen_key, seen_value = self._seen
        # One write for both blocks: torch.compile would pay for a second one with a copy of all that is seen.
        seen_key.index_copy_(1, self._places, key)
        seen_value.index_copy_(1, self._places, value)
        first, second = slice(None, -self._only_second), slice(self._only_first, None)
        return (seen_key[:, first], seen_value[:, first]), (seen_key[:, second], seen_value[:, second])

    def store(self, key: torch.Tensor, value: torch.Tensor):
        """Keep a block's (clean) keys and values; [`commit`] brings them into the slots."""
        self._stored = (key, value) if self.keeps_graph else (key.detach(), value.detach())

    def make_room(self, key: torch.Tensor, value: torch.Tensor):
        """Buffers for keys and values like these, of a block."""
        num_tokens = self.state.end + self.state.block_frames * self.state.frame_tokens
        self.key, self.value = (new_buffer(x, len(x), num_tokens) for x in (key, value))

    def commit(self):
        """Bring what [`store`] was given into the slots; the frames that leave the window are overwritten."""
        if self._stored is None:
            return
        state, (key, value) = self.state, self._stored
        size = state.frame_tokens
        if state.cut:
            # It was for this block. Before the slots are written: it may take some of theirs.
            in_place, self.flushed.in_place = self.flushed.in_place, None
            self.key[:, state.end - in_place.shape[1] : state.end] = in_place
        for i, frame in enumerate(range(state.num_frames, state.num_frames + key.shape[1] // size)):
            slot = state.slots.slot(frame - state.first_frame)
            if slot is not None:
                self.key[:, state.tokens(slot)] = key[:, i * size : (i + 1) * size]
                self.value[:, state.tokens(slot)] = value[:, i * size : (i + 1) * size]
        self._stored = None

    def flush(self, slots: list[int], rotary: Rotary | None, cut: Rotary | None):
        """Keep what is in these slots alone, in slots 0, 1, ... from now on. `rotary` takes the keys of the first of
        them from where they were stored to their new place, `cut` all of them away until a block is stored."""
        state = self.state
        tokens = [state.tokens(slot) for slot in reversed(slots)]
        key, value = (torch.cat([buffer[:, part] for part in tokens], dim=1) for buffer in (self.key, self.value))
        oldest = slice(-state.frame_tokens, None)
        if self.flushed is not None:
            first = self.flushed.first
        else:
            # Of a sink that has moved the originals are at hand.
            first = (key if self._sink_key is None else self._sink_key)[:, oldest].clone()
        if rotary is not None:
            key[:, oldest] = apply_rotary(first, rotary)
        self.forget_sink()
        self.flushed = FlushedKeys(first, None if cut is None else key)
        kept = slice(state.end - key.shape[1], state.end)
        self.key[:, kept] = key if cut is None else apply_rotary(key, cut)
        self.value[:, kept] = value

    def shift_sink(self, shift: int, rotary: Rotary):
        """Place the sink keys `shift` frames after their own positions; `rotary` is the rotation that does it."""
        if shift == self._sink_shift or self.key is None:
            return
        end = self.state.end
        sink = self.key[:, end - self.state.slots.sink_size * self.state.frame_tokens : end]
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
        num_layers: of the transformer.
        max_frames: the longest video in latent frames. Required if the model's window is unlimited
            (`local_attn_size=-1`), and then an upper bound; ignored otherwise.
        past_weight: factor in (0, 1] of the attention that a noisy block pays to the frames before it, the video's
            first one excepted. Less than 1 keeps errors from piling up (Krea).
    """

    keeps_graph = False  # as its layers
    # Whether videos that go on from one may attend to its keys and values, kept once ([`share_past`]).
    shares_past = True

    def __init__(self, num_layers: int, max_frames: int | None = None, past_weight: float = 1.0):
        self.max_frames = max_frames
        self.past_weight = past_weight
        self.state = KVCacheState()
        self._text: torch.Tensor | None = None
        # The model whose text the layers have, and that of others: experts share a cache, but not their projections.
        self._text_model: object = None
        self._other_texts: dict[object, list[KeyValue | None]] = {}
        self.layer_caches = [CausalWanKVLayerCache(self.state) for _ in range(num_layers)]

    @property
    def num_frames(self) -> int:
        """Latent frames stored so far, those that left the window included."""
        return self.state.num_frames

    @property
    def keeps_first(self) -> bool:
        """Whether the first frame is still there: until a ring without a sink takes its slot for another."""
        state = self.state
        return state.num_frames - state.first_frame <= state.slots.capacity or state.slots.sink_size > 0

    @property
    def first_frame(self) -> int:
        """The first latent frame that is cached, those that left the window included; after a flush the one whose
        place that has."""
        return self.state.first_frame

    @property
    def has_gap(self) -> bool:
        """Whether a flush has forgotten what followed the first frame."""
        return self.state.first_shift > 0

    def get(self, layer_idx: int) -> CausalWanKVLayerCache:
        return self.layer_caches[layer_idx]

    def clear(self):
        """Forget all frames and free their memory."""
        state = self.state
        state.num_frames = state.num_cached = state.first_frame = state.first_shift = state.margin_frames = 0
        state.cut = False
        for layer_cache in self.layer_caches:
            layer_cache.clear()

    def set_text(self, encoder_hidden_states: torch.Tensor | None):
        """Keep the text's keys and values over the passes without gradients that get this very tensor.

        The first of them computes these. Whoever sets a text answers for the weights: set it again where they may have
        changed. Passes with another tensor or with gradients compute their own, as all do if no text is set.
        """
        self._text = encoder_hidden_states
        self._other_texts.clear()
        for layer_cache in self.layer_caches:
            layer_cache.text = None

    def begin_text(self, encoder_hidden_states: torch.Tensor, model: object) -> bool:
        """Whether this pass of a model has the keys and values of its text already."""
        if model is not self._text_model:
            self._other_texts[self._text_model] = [layer_cache.text for layer_cache in self.layer_caches]
            self._text_model = model
            texts = self._other_texts.get(model) or [None] * len(self.layer_caches)
            for layer_cache, text in zip(self.layer_caches, texts):
                layer_cache.text = text
        self.state.keeps_text = self._text is encoder_hidden_states and not torch.is_grad_enabled()
        for layer_cache in self.layer_caches:
            layer_cache.begin_text(encoder_hidden_states)
        return self.state.keeps_text and self.layer_caches[-1].text is not None

    def rewind(self, num_frames: int, num_kept: int):
        """Go back to `num_frames` frames, to write those after them anew, all at once.

        Of the frames before, only the first `num_kept` stay, the sink or what a flush has put into slot 0; if none do,
        the next frames that are written become the sink.
        """
        state = self.state
        state.num_frames, state.num_cached, state.rewound = num_frames, num_kept, True
        if num_kept == 0:
            state.first_frame, state.first_shift = num_frames, 0
            for layer_cache in self.layer_caches:
                layer_cache.forget_sink()

    def flush(self, config, rope: CausalWanRotaryPosEmbed, cut: bool = False):
        """
        Infinity-RoPE's KV flush: forget all frames but the oldest that the next block would see, which of a model with
        a sink is the video's first, and the newest two. The window fills again after them, and its sink, if there is
        one, begins with them. What is stored of them stays as it is; but with relative positions the oldest is from
        now on right before the other two.

        With `cut` the next block sees them from afar (its RoPE cut): as if it began with temporal row 45 and they were
        rows 0 to 2, the oldest where it is with absolute positions. Blocks after that see all in its place.

        Blocks and windows of any size: where only one or two frames are cached these are all, and where a window
        leaves room for three beside a block nothing is left to forget.
        """
        state = self.state
        if state.num_cached == 0:
            return
        frames = kept_frames(state.num_frames - state.first_frame, state.slots.capacity, state.slots.sink_size)
        slots, first_frame = [state.slots.slot(frame) for frame in frames], state.num_frames - len(frames)
        if frames[0] == 0:
            state.first_shift += first_frame - state.first_frame
        else:
            # Without a sink the frame that an earlier flush kept has left since.
            state.first_shift = first_frame - (state.first_frame + frames[0])
            for layer_cache in self.layer_caches:
                layer_cache.forget_sink()
        state.first_frame, state.num_cached, state.cut = first_frame, len(frames), cut
        device = self.layer_caches[0].key.device
        rotary = rope.shift(state.first_shift, device) if config.rope_mode == "relative" else None
        # That the block is later, or all else earlier, is the same; its keys then are where later blocks see them.
        away = rope.shift(len(frames) - CUT_ROW, device) if cut else None
        for layer_cache in self.layer_caches:
            layer_cache.flush(slots, rotary, away)

    def commit(self, layer_idx: int):
        """Bring what a layer has stored into its slots: at once, so that no more than one layer's keys are twice in
        memory. The first one makes room for all of them. What is made between passes of blocks lies where one of
        these had its own, and the next has to find another place: of 80 GB a third was such holes."""
        layer_cache = self.layer_caches[layer_idx]
        if layer_cache.key is None and layer_cache._stored is not None:
            for other in self.layer_caches:
                other.make_room(*layer_cache._stored)
        layer_cache.commit()

    def advance(self, num_frames: int):
        """Count frames that every layer has stored."""
        for layer_idx in range(len(self.layer_caches)):
            self.commit(layer_idx)
        state = self.state
        state.num_frames += num_frames
        state.num_cached = min(state.num_cached + num_frames, state.slots.capacity)
        state.rewound = state.cut = False

    def select(self, videos: list[int]) -> "CausalWanKVCache":
        """A cache of its own for some videos of the batch."""
        other = copy.copy(self)
        other._text, other._other_texts = None, {}
        other.state = replace(self.state, shape=self.state.shape and (len(videos), *self.state.shape[1:]))
        other.layer_caches = [layer_cache.select(videos, other.state) for layer_cache in self.layer_caches]
        return other

    def can_pair(self, num_frames: int, config) -> bool:
        """Whether one pass can store the next block, of `num_frames`, and read the one after it, without gradients.
        Not where only some of as many frames leave the window: when one that is no whole number of blocks fills up;
        nor where the two see the cached frames at different places, as after a cut."""
        state = self.state
        if state.cut:
            return False
        entering = self._entering(num_frames, state.slots if state.num_frames else self._slots(config))
        if None in entering or len(set(entering)) < num_frames:
            return False  # the second block does not see all of the first
        num_leaving = sum(slot < state.num_cached for slot in entering)
        return num_leaving in (0, num_frames) and self.past_weight == 1 and not torch.is_grad_enabled()

    def _entering(self, num_frames: int, slots: BoundedSlots | RingSlots) -> list[int | None]:
        """The slots of the next frames."""
        first = self.state.num_frames - self.state.first_frame
        return [slots.slot(frame) for frame in range(first, first + num_frames)]

    def begin_block(
        self,
        frame_offset: int,
        num_frames: int,
        frame_tokens: int,
        shape: tuple[int, int, int],
        config,
        paired: bool = False,
    ):
        """Check a block, or a pair of them with `num_frames` together, against the cache. Before the first one, size
        the slots by the model's window."""
        state = self.state
        block_frames = num_frames // 2 if paired else num_frames
        if frame_offset != state.num_frames:
            raise ValueError(
                f"`frame_offset` must be {state.num_frames}, the number of latent frames in `kv_cache`, but is "
                f"{frame_offset}."
            )
        if state.num_frames == 0:
            state.frame_tokens, state.shape, state.block_frames = frame_tokens, shape, config.num_frames_per_block
            state.slots = self._slots(config)
        elif shape != state.shape:
            raise ValueError(f"`kv_cache` serves batch, height and width {state.shape}, but this block has {shape}.")
        elif block_frames > state.block_frames and not state.rewound:
            raise ValueError(
                f"a block of {block_frames} latent frames cannot follow cached ones: the model's blocks have "
                f"{state.block_frames} at most."
            )
        if isinstance(state.slots, BoundedSlots) and frame_offset + num_frames > self.max_frames:
            raise ValueError(
                f"latent frame {frame_offset + num_frames - 1} passes `max_frames={self.max_frames}` of `kv_cache`."
            )
        if paired:
            self._begin_pair(block_frames, config)
            return
        for layer_cache in self.layer_caches:
            layer_cache.begin_block(num_frames * frame_tokens)

    def _begin_pair(self, num_frames: int, config):
        state = self.state
        if not self.can_pair(num_frames, config):
            raise ValueError(
                f"these blocks of {num_frames} latent frames need a pass each: `kv_cache.can_pair` tells beforehand."
            )
        if isinstance(state.slots, RingSlots) and not state.margin_frames:
            # Mostly before there are buffers: the margin costs nothing then, and whoever makes no pairs has none.
            state.margin_frames = state.block_frames + self._moving_sink(config)
            for layer_cache in self.layer_caches:
                layer_cache.add_margin(state.margin_frames * state.frame_tokens)
        buffer = self.layer_caches[0].key
        if buffer is None:
            return  # the first pair of a video: there is nothing to see yet
        entering = self._entering(num_frames, state.slots)
        leaving = []
        if entering[0] < state.num_cached:
            leaving = [*range(self._moving_sink(config)), *entering]
        num_seen = len(leaving) + min(state.num_cached + num_frames, state.slots.capacity)
        seen = slice(state.end - num_seen * state.frame_tokens, state.end + num_frames * state.frame_tokens)
        workspace = torch.arange(state.end, seen.stop, device=buffer.device)
        places = torch.cat([self._tokens(entering, buffer.device), workspace]) - seen.start
        for layer_cache in self.layer_caches:
            layer_cache.begin_pair(seen, places, self._tokens(leaving, buffer.device))

    def _tokens(self, slots: list[int], device: torch.device) -> torch.Tensor:
        """Places of the tokens of these slots in the layers' buffers."""
        ranges = [self.state.tokens(slot) for slot in slots] or [slice(0, 0)]
        return torch.cat([torch.arange(tokens.start, tokens.stop, device=device) for tokens in ranges])

    def _slots(self, config) -> BoundedSlots | RingSlots:
        """Those that the model's window needs."""
        # The current block is never read from a slot, and nothing follows the last block of a bounded video.
        if config.local_attn_size != -1:
            return RingSlots(config.local_attn_size - config.num_frames_per_block, config.sink_size)
        if self.max_frames is None:
            raise ValueError(
                "the model's window is unlimited: state the longest video in latent frames, "
                "`CausalWanKVCache(num_layers, max_frames=...)`."
            )
        return BoundedSlots(max(self.max_frames - config.num_frames_per_block, 0))

    def _moving_sink(self, config) -> int:
        """Frames of the sink if every block has it at another position."""
        return config.sink_size if config.rope_mode == "relative" else 0

    def place_sink(self, position: int, rope: CausalWanRotaryPosEmbed, device: torch.device):
        """With relative positions, before a block: the sink begins at this one, or at its own if that is later."""
        state = self.state
        if state.slots.sink_size:
            shift = max(position - state.first_frame, 0)
            rotary = rope.shift(shift, device)
            for layer_cache in self.layer_caches:
                layer_cache.shift_sink(shift, rotary)

    def attention_mask(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """What `past_weight` adds to the scores of the keys that a block of `num_tokens` sees, `(1, 1, 1, keys)`."""
        state = self.state
        num_seen = state.num_cached + state.num_beside
        if self.past_weight == 1 or num_seen == 0:
            return None
        cached = num_seen * state.frame_tokens
        mask = torch.zeros(1, 1, 1, cached + num_tokens, device=device, dtype=dtype)
        mask[..., : cached - state.frame_tokens * self.keeps_first] = math.log(self.past_weight)
        return growing(mask, dim=3)
