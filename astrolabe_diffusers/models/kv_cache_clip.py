"""A K/V cache for passes over several blocks of a clip."""

import torch

from .block_layout import BlockLayout
from .kv_cache import CausalWanKVCache, CausalWanKVLayerCache


class ClipKVLayerCache(CausalWanKVLayerCache):
    """Keys and values of one transformer layer, of the clip's frames in their order.

    Attributes:
        keys, values: of each unit of frames ([`BlockLayout`]) `(batch, tokens, heads, head_dim)`, or `None` if no
            block sees it any more.
    """

    unit_tokens: int

    def clear(self):
        super().clear()
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []

    def commit(self):
        if self._stored is None:
            return
        for units, stored in zip((self.keys, self.values), self._stored):
            # Copies: a view of one unit would keep the whole pass in memory.
            units.extend(unit.clone() for unit in stored.split(self.unit_tokens, dim=1))
        self._stored = None

    def begin_pass(self, layout: BlockLayout, first_end: int):
        """Before one that stores, and whose first block ends before frame `first_end`: forget what no block will see.
        A sink that takes up what leaves has that of what is forgotten."""
        self.unit_tokens = layout.unit * layout.frame_tokens
        if layout.ema is not None and self.keys:
            sink = list(zip(self.keys[: layout.sink_units], self.values))
            layout.take_up(sink, self.keys, self.values, range(layout.num_taken, layout.taken_before(first_end)))
            self.keys[: layout.sink_units], self.values[: layout.sink_units] = zip(*sink)
        kept = set(layout.units(layout.context(first_end - layout.block_frames, first_end)))
        for units in (self.keys, self.values):
            units[:] = [unit if i in kept else None for i, unit in enumerate(units)]


class ClipKVCache(CausalWanKVCache):
    """Keys and values of a clip's clean blocks, for passes over any number of blocks, as in training.

    `"store"` and `"write"` take the clean blocks that follow those stored; each sees the clean ones before it, of its
    own pass too. `"read"` takes noisy blocks; each sees the clean ones before it, which have to be stored, and itself,
    and with grad what is stored are constants. It may bring the clean blocks that follow those stored, one for each
    noisy block, which then have gradients too. All of this as far as the model's window and sink allow.

    A pass that stores first forgets what neither its first block nor a later one sees: memory follows the window and
    the blocks of a pass. Blocks before it can then not be read any more.

    A sink that takes up what leaves the window ([`SinkEMA`]) is for each block that of its own time. What has been
    forgotten is in it; of the rest every pass takes up as much as each of its blocks has to see.

    Videos may share their past: what was stored as one video is seen by all of a later, larger batch.

    With `keeps_graph` what is stored with grad are no constants: gradients flow through it.
    """

    def __init__(self, num_layers: int, keeps_graph: bool = False):
        super().__init__(0)
        self.keeps_graph = keeps_graph
        self.layer_caches = [ClipKVLayerCache(self.state) for _ in range(num_layers)]
        for layer_cache in self.layer_caches:
            layer_cache.keeps_graph = keeps_graph
        self.num_taken = 0  # units of the clip in the sink that is kept, if it takes up what leaves

    def clear(self):
        super().clear()
        self.num_taken = 0

    def commit(self, layer_idx: int):
        self.layer_caches[layer_idx].commit()

    def begin_clip(
        self, layout: BlockLayout, shape: tuple[int, int, int], stores: bool, brings_clean: bool = False
    ):
        """Check a pass over blocks of latents of this batch, height and width, and forget what it need not see."""
        state, first, n = self.state, layout.first_frame, layout.block_frames
        if state.num_frames and shape[1:] != state.shape[1:]:
            raise ValueError(
                f"`kv_cache` serves height and width {state.shape[1:]}, but these blocks have {shape[1:]}."
            )
        if state.num_frames and state.shape[0] not in (1, shape[0]):
            raise ValueError(f"`kv_cache` has blocks of {state.shape[0]} videos, and these are of {shape[0]}.")
        if not stores:
            kept = {i for i, key in enumerate(self.layer_caches[0].keys) if key is not None}
            if brings_clean:
                # Those of the pass are counted on from the cache's.
                self._check_follows(first)
                kept.update(layout.units([(first, first + n * len(layout.sink_shifts))]))
            for start in range(first, first + n * len(layout.sink_shifts), n):
                end = start + n
                lacks = not kept.issuperset(layout.units(layout.context(start, end)))
                if start % n or lacks or layout.taken_before(end) < self.num_taken:
                    raise ValueError(f"`kv_cache` lacks frames that a block from latent frame {start} on sees.")
            return
        self._check_follows(first)
        state.shape = shape
        for layer_cache in self.layer_caches:
            layer_cache.begin_pass(layout, first + n)
        if layout.ema is not None:
            self.num_taken = layout.num_taken = layout.taken_before(first + n)

    def _check_follows(self, first: int):
        if first != self.state.num_frames:
            raise ValueError(
                f"`frame_offset` must be {self.state.num_frames}, the number of latent frames in `kv_cache`, but is "
                f"{first}."
            )
