"""The smallest transformer that pipeline and trainer take: what CONTRIBUTING.md says of it and nothing else."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from astrolabe_diffusers import CausalWanKVCache


class OwnBlock(nn.Module):
    """One head of attention to the past and the own block, and to nothing else."""

    def __init__(self, dim):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, hidden_states, cache, mode):
        query, key, value = (f(hidden_states).unsqueeze(2) for f in (self.to_q, self.to_k, self.to_v))
        keys, values = cache.extend(key, value)
        if mode == "write":
            cache.store(key, value)
        attended = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values)))
        return hidden_states + attended.squeeze(1)


class OwnTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    _repeated_blocks = ["OwnBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels=4,
        dim=8,
        text_dim=32,
        patch_size=(1, 1, 1),
        num_layers=2,
        num_frames_per_block=3,
        local_attn_size=-1,
        sink_size=0,
        rope_mode="absolute",
        rope_max_seq_len=64,
        image_dim=None,
    ):
        super().__init__()
        self.embed, self.text, self.time = nn.Linear(in_channels, dim), nn.Linear(text_dim, dim), nn.Linear(1, dim)
        self.blocks = nn.ModuleList(OwnBlock(dim) for _ in range(num_layers))
        self.out = nn.Linear(dim, in_channels)

    def new_kv_cache(self, max_frames=None, past_weight=1.0):
        return CausalWanKVCache(self.config.num_layers, max_frames, past_weight)

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        *,
        kv_cache=None,
        kv_cache_mode=None,
        frame_offset=0,
        attention_kwargs=None,
        return_dict=True,
    ):
        batch_size, _, num_frames, height, width = hidden_states.shape
        kv_cache.begin_block(frame_offset, num_frames, height * width, (batch_size, height, width), self.config)
        condition = self.text(encoder_hidden_states).mean(1) + self.time(timestep[:, None].to(self.dtype) / 1000)
        tokens = self.embed(hidden_states.flatten(2).transpose(1, 2)) + condition[:, None]
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, kv_cache.get(i), kv_cache_mode)
        if kv_cache_mode == "write":
            kv_cache.advance(num_frames)
        flow = self.out(torch.tanh(tokens)).transpose(1, 2).view_as(hidden_states)
        return (flow,)
