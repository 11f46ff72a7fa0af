"""A K/V cache with a memory bank: frames of long ago, chosen by the text (MemFlow)."""

from dataclasses import dataclass

import torch

from .kv_cache import CausalWanKVCache, CausalWanKVLayerCache, KeyValue, KVCacheState, new_buffer


BANK_UPDATES = ("once", "interactive", "single_prompt")


@dataclass(frozen=True)
class MemoryBank:
    """
    When which frames enter a bank of `size` frames.

    The first frames of the blocks 0, `interval`, 2 * `interval`, ... are recorded and enter the bank before the next
    block. Once it is full, the frame leaves that fits the text least. `update` is one of `BANK_UPDATES`: `"once"` does
    just that. The others are what MemFlow released. In both the bank, once full, takes a frame in before every block:
    without a new one a copy of the newest again; and the text of the block after a recache does not count.
    `"single_prompt"` also records every block, and the newest replaces the one before until the interval is over.
    """

    size: int
    interval: int
    update: str

    def records(self, block: int) -> bool:
        """Whether the first frame of a block is recorded."""
        return self.update == "single_prompt" or block % self.interval == 0

    def takes_in(self, block: int) -> bool:
        """Whether the newest record enters the bank before a block."""
        return self.update != "once" or self.records(block - 1)

    def num_needed(self, block: int) -> int:
        """Frames that a bank without bounds has before a block."""
        return (block - 1) // self.interval + 1


@dataclass
class MemoryBankState(KVCacheState):
    bank: MemoryBank | None = None


class MemoryBankKVLayerCache(CausalWanKVLayerCache):
    """
    A layer that also keeps a bank, left of the slots in use, so that a block sees all as one slice:

        spare               bank    slots in use    workspace
        |--|                |-------- seen by a block -------|

    A frame that is left out of a full bank stays in the spare place until the next block is stored: a block with
    another text chooses again. Of a text it needs the mean of its keys in this layer, for the score is the mean over
    all pairs of a token of the frame and one of the text. Every video has its own choice.
    """

    state: MemoryBankState

    def clear(self):
        super().clear()
        self._num_blocks = 0  # stored
        self._num_kept = 0  # frames in the bank
        self._beside = 0  # slots in use that the bank lies beside
        self._spare: KeyValue | None = None  # (batch, tokens, heads, head_dim) each
        # Places in the bank, of each video `(batch,)`: of the newest frame, and of the one that the spare frame took
        # for the next block, if the bank is full and takes one in.
        self._newest: torch.Tensor | None = None
        self._choice: torch.Tensor | None = None
        # Of the last pass: the text, and the mean of its keys `(batch, heads, head_dim)`.
        self._text: torch.Tensor | None = None
        self._text_key: torch.Tensor | None = None
        self._past_text: torch.Tensor | None = None
        self._chooses = self._chooses_next = False
        self._ignores_text = False

    def select(self, videos: list[int], state: MemoryBankState) -> "MemoryBankKVLayerCache":
        other = super().select(videos, state)
        self._hand_over(other, videos)
        return other

    def go_on(self, state: MemoryBankState, num_videos: int) -> "MemoryBankKVLayerCache":
        other = type(self)(state)
        state.margin_frames = state.bank.size
        num_tokens = state.end + state.block_frames * state.frame_tokens
        other.key, other.value = (new_buffer(x, num_videos, num_tokens) for x in (self.key, self.value))
        self._hand_over(other, [0] * num_videos)
        other._past_text, other._beside = self._text, state.num_cached
        for place, frames in zip(other._bank(), self._bank()):
            place.copy_(frames)
        return other

    def _hand_over(self, other: "MemoryBankKVLayerCache", videos: list[int]):
        for name in ("_num_blocks", "_num_kept", "_beside", "_ignores_text"):
            setattr(other, name, getattr(self, name))
        for name in ("_newest", "_choice"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor[videos])
        other._spare = self._spare and tuple(x[videos] for x in self._spare)

    def _bank(self) -> KeyValue:
        """Keys and values of its frames, as views `(batch, frames, tokens, heads, head_dim)`."""
        state = self.state
        stop = state.end - self._beside * state.frame_tokens
        tokens = slice(stop - self._num_kept * state.frame_tokens, stop)
        return tuple(x[:, tokens].unflatten(1, (self._num_kept, state.frame_tokens)) for x in (self.key, self.value))

    def begin_block(self, num_tokens: int):
        state = self.state
        state.num_beside = self._num_kept
        if self._num_kept and self._beside != state.num_cached:  # after a rewind
            frames = [x.clone() for x in self._bank()]
            self._put(frames, state.num_cached)
        super().begin_block(num_tokens)
        if state.rewound:
            self._ignores_text = state.bank.update != "once"
        following = self._num_blocks + 1
        is_full = state.bank.num_needed(following) > state.bank.size
        self._chooses_next = is_full and state.bank.takes_in(following) and not state.rewound

    def begin_text(self, encoder_hidden_states: torch.Tensor):
        self._chooses = self._choice is not None and (self.state.rewound or not self._knows(encoder_hidden_states))
        self._text = encoder_hidden_states

    def _knows(self, text: torch.Tensor) -> bool:
        """Whether it is the last pass's: the very tensor, or in the first pass that of the video that these go on
        from. Then the weights of that pass have chosen, and others that predict from the same past see the same."""
        if text is self._text:
            return True
        past, self._past_text = self._past_text, None
        return past is not None and past.shape[1:] == text.shape[1:] and torch.equal(past.expand_as(text), text)

    def needs_text_key(self, kv_cache_mode: str) -> bool:
        return self._chooses or (self._chooses_next and kv_cache_mode != "read")

    def see_text(self, key: torch.Tensor):
        self._text_key = key.detach().mean(dim=1, dtype=torch.float32)
        if self._chooses:
            size = self.state.bank.size
            bank = (x[:, : size * self.state.frame_tokens].unflatten(1, (size, -1)) for x in self._seen)
            self._choose(tuple(bank))

    def make_room(self, key: torch.Tensor, value: torch.Tensor):
        self.state.margin_frames = self.state.bank.size
        super().make_room(key, value)

    def commit(self):
        if self._stored is None:
            return
        state, (key, value) = self.state, self._stored
        size = state.frame_tokens
        # The block may take the slots that the bank lies in.
        frames = [x.clone() for x in self._bank()] if self._num_kept else ()
        super().commit()
        self._put(frames, min(state.num_cached + key.shape[1] // size, state.slots.capacity))
        if not state.rewound:
            self._end_block((key[:, :size], value[:, :size]))

    def _put(self, frames: list[torch.Tensor], num_cached: int):
        self._beside = num_cached
        for place, x in zip(self._bank() if frames else (), frames):
            place.copy_(x)

    def _end_block(self, first_frame: KeyValue):
        """Record a block, and make the bank that of the next one."""
        bank, is_recorded = self.state.bank, self.state.bank.records(self._num_blocks)
        if self._choice is not None:
            self._newest, self._choice = self._choice, None
        self._ignores_text = False
        if is_recorded:
            self._spare = tuple(x.clone() for x in first_frame)
        self._num_blocks += 1
        if not bank.takes_in(self._num_blocks):
            return
        if bank.num_needed(self._num_blocks) <= bank.size:
            self._num_kept = bank.num_needed(self._num_blocks)
            for place, x in zip(self._bank(), self._spare):
                place[:, 0] = x
            self._newest = torch.zeros(len(self.key), dtype=torch.long, device=self.key.device)
            return
        if not is_recorded:
            videos = torch.arange(len(self.key), device=self.key.device)
            self._spare = tuple(x[videos, self._newest] for x in self._bank())
        self._choose(self._bank())

    def _choose(self, bank: KeyValue):
        """The spare frame takes the place of the one that fits the text least."""
        if self._choice is not None:
            self._swap(bank, self._choice)
        leaving = self._newest
        if not self._ignores_text:
            frame_keys = bank[0].mean(dim=2, dtype=torch.float32)
            leaving = torch.einsum("bfhd,bhd->bf", frame_keys, self._text_key).argmin(dim=1)
        self._swap(bank, leaving)
        self._choice = leaving

    def _swap(self, bank: KeyValue, frame: torch.Tensor):
        videos = torch.arange(len(frame), device=frame.device)
        left_out = tuple(x[videos, frame] for x in bank)
        for x, spare in zip(bank, self._spare):
            x[videos, frame] = spare
        self._spare = left_out


class MemoryBankKVCache(CausalWanKVCache):
    """
    A cache whose blocks also see the frames of a [`MemoryBank`], each with the position that it had in the video.

    What a block sees of the bank is chosen when the block before it is stored, by the text and the weights of that
    pass, and again by a pass with another text. A block written anew after [`rewind`] sees the bank, and is not
    recorded. Takes `size + 1` frames a layer more than [`CausalWanKVCache`].
    """

    def __init__(self, num_layers: int, max_frames: int | None, past_weight: float, bank: MemoryBank):
        super().__init__(0, max_frames, past_weight)
        self.state = MemoryBankState(bank=bank)
        self.layer_caches = [MemoryBankKVLayerCache(self.state) for _ in range(num_layers)]

    def can_pair(self, num_frames: int, config) -> bool:
        # The two blocks do not see the same frames of the bank.
        return False
