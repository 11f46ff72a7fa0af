"""A tiny pipeline with a second expert that writes the cache, and such a model written the slow way."""

from __future__ import annotations

import torch

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.tiny_pipeline import tiny_pipeline, tiny_transformer


PROMPT = "a red circle moves up on a white background"
WINDOWS = {
    "unlimited": {},
    "chunkwise": {"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"},
    "framewise": {"num_frames_per_block": 1, "local_attn_size": 5, "sink_size": 2, "rope_mode": "relative"},
    "absolute": {"local_attn_size": 9, "sink_size": 3},
}


def sizes_of(transformer: CausalWanTransformer3DModel) -> dict:
    return {name: value for name, value in transformer.config.items() if not name.startswith("_")}


def two_expert_pipeline(copy: bool = False, **overrides) -> CausalWanPipeline:
    """[`tiny_pipeline`] with a memory transformer of other weights, or with a `copy` of the transformer."""
    pipe = tiny_pipeline(**overrides)
    memory = tiny_transformer(seed=0 if copy else 1, **sizes_of(pipe.transformer))
    pipe.register_modules(memory_transformer=memory)
    return pipe


class ReferenceExperts(ReferenceCausalWan):
    """Every block that is stored is the memory expert's, every other one the first's."""

    def __init__(self, weights: dict, memory_weights: dict, config: dict):
        super().__init__(weights, config)
        self.memory = ReferenceCausalWan(memory_weights, config)

    def block(self, *args, store: bool, **kwargs):
        return (self.memory if store else super()).block(*args, store=store, **kwargs)

    def teacher_forcing(self, noisy, clean, timestep, text, detach: bool):
        """The flow of noisy blocks, each of which sees the memory expert's keys and values of those before it."""
        n, grid = self.frames_per_block, (noisy.shape[3] // self.patch, noisy.shape[4] // self.patch)
        kept = [[] for _ in range(self.num_layers)]
        flows = []
        for start in range(0, noisy.shape[2], n):
            visible = self.visible_frames(start + n)
            for expert, latents, t in ((self, noisy, timestep), (self.memory, clean, torch.zeros_like(timestep))):
                tokens = expert.embed_frames(latents[:, :, start : start + n].to(self.dtype))
                embedding, modulation = expert.embed_time(t[:, None].expand(-1, n))
                embedded_text = expert.embed_text(text)
                for layer in range(self.num_layers):
                    query, key, value = expert.self_attention_inputs(layer, tokens, modulation)
                    everything = kept[layer][:start] + list(zip(key.unbind(1), value.unbind(1)))
                    seen = {frame: everything[frame] for frame in visible}
                    attended = expert.self_attention(query, start, seen, grid)
                    tokens = expert.rest_of_block(layer, tokens, attended, modulation, embedded_text)
                    if expert is self.memory:
                        kept[layer] = everything
                if expert is self:
                    flows.append(self.head(tokens, embedding, *grid))
            if detach:
                kept = [[(key.detach(), value.detach()) for key, value in frames] for frames in kept]
        return torch.cat(flows, dim=2)


def reference_of(pipe: CausalWanPipeline) -> ReferenceExperts:
    weights = (expert.state_dict() for expert in (pipe.transformer, pipe.memory_transformer))
    return ReferenceExperts(*weights, dict(pipe.transformer.config))


@torch.no_grad()
def expected_latents(pipe: CausalWanPipeline, texts: list[str], num_given: int = 0, seed: int = 0, **kwargs):
    """Latents with one prompt a block; `num_given` of the blocks are `given`."""
    n, sigmas, count = pipe.transformer.config.num_frames_per_block, pipe.config.sigmas, len(texts) - num_given
    shape = (1, 4, n * count, pipe.config.height // 8, pipe.config.width // 8)
    noise, renoise = published_noise(torch.Generator().manual_seed(seed), shape, n, [len(sigmas)] * count)
    embeds = {text: pipe.encode_prompt(text) for text in texts}
    return reference_of(pipe).sample(noise, renoise, [embeds[text] for text in texts[num_given:]], sigmas, **kwargs)
