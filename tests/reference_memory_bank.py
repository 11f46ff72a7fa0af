"""MemFlow's memory bank written the slow way: the reference model with a list of frames a video and layer.

It follows the order of the released loop. In the first pass of a block each layer's bank is updated; the clean pass of
a block leaves its first frame as what the next update takes in. Everything is done video by video.
"""

from __future__ import annotations

import torch

from tests.reference_causal_wan import ReferenceCausalWan


class ReferenceMemoryBank(ReferenceCausalWan):
    def __init__(self, state_dict: dict, config: dict, dtype: torch.dtype = torch.float64):
        super().__init__(state_dict, config, dtype)
        self.size, self.interval = config["memory_bank_size"], config["memory_bank_interval"]
        self.released = config["memory_bank_update"] != "once"
        self.record_all = config["memory_bank_update"] == "single_prompt"
        self.forget()

    def forget(self):
        self.bank = {}  # (layer, video) -> frames of the bank: (number, rotated key, value), [L, heads, D] each
        self.new = {}  # (layer, video) -> such a frame
        self.is_new = False
        self.blocks = 0  # that have had their clean pass
        self.updated = -1  # the block that the banks were last updated for
        self.recaching = False
        self.left = []  # numbers of the frames that left the banks of the first block's layers, in the order of time

    def context_of(self, clean, text):
        self.forget()
        return super().context_of(clean, text)

    def recache(self, video, text, context, global_sink):
        self.recaching = True
        result = super().recache(video, text, context, global_sink)
        self.recaching = False
        return result

    def score(self, layer, key, text):
        """Mean over the frame's tokens [L, heads, D], the text's [T, dim] and heads of the scaled products."""
        name = f"blocks.{layer}.attn2"
        text_key = self.split_heads(self.rms_norm(self.linear(text, f"{name}.to_k"), f"{name}.norm_k"))
        return torch.einsum("lhd,thd->lht", key, text_key).mean().item() / self.head_dim**0.5

    def update(self, layer, video, text):
        if self.blocks == 0 or (not self.released and not self.is_new):
            return
        place = (self.blocks - 1) // self.interval + 1
        bank, new = self.bank.setdefault((layer, video), []), self.new[layer, video]
        if place <= self.size:
            bank[place - 1 :] = [new]
            return
        scores = [self.score(layer, key, text) for _, key, _ in bank]
        if self.released and self.recaching:
            scores = [0.0] * len(bank)  # the text's keys are zero there
        order = sorted(range(self.size), key=lambda i: -scores[i])
        self.left.append((layer, video, self.blocks, bank[order[-1]][0]))
        bank[:] = [bank[i] for i in order[:-1]] + [new]

    def block(self, latents, timestep, text, context, store, visible=None):
        start, num_frames = context.num_frames, latents.shape[2]
        end = start + num_frames
        timestep = timestep[:, None].expand(-1, num_frames)
        grid = (latents.shape[3] // self.patch, latents.shape[4] // self.patch)
        text = self.embed_text(text)
        latents = latents.to(self.dtype)
        tokens = self.embed_frames(latents)
        embedding, modulation = self.embed_time(timestep)
        visible = self.visible_frames(end) if visible is None else visible
        is_first_pass = self.updated != self.blocks
        for layer in range(self.num_layers):
            query, key, value = self.self_attention_inputs(layer, tokens, modulation)
            query = self.rotate(query, list(range(start, end)), *grid)
            new = list(zip(key.unbind(1), value.unbind(1)))
            everything = context.layers[layer] + new
            attended = []
            for video in range(len(latents)):
                if is_first_pass:
                    self.update(layer, video, text[video])
                keys, values = [], []
                for frame in visible:
                    position = self.key_position(frame, end, context.sink_offset)
                    keys.append(self.rotate(everything[frame][0][video, None, None], [position], *grid)[0, 0])
                    values.append(everything[frame][1][video])
                for _, bank_key, bank_value in self.bank.get((layer, video), []):
                    keys.append(bank_key)
                    values.append(bank_value)
                own_query = query[video].flatten(0, 1)[None]
                attended.append(self.attention(own_query, torch.cat(keys)[None], torch.cat(values)[None]))
                if store and not self.recaching and (self.record_all or self.blocks % self.interval == 0):
                    rotated = self.rotate(key[video, None, :1], [start], *grid)[0, 0]
                    self.new[layer, video] = start, rotated.detach(), value[video, 0].detach()
            attended = torch.cat(attended).unflatten(1, query.shape[1:3])
            tokens = self.rest_of_block(layer, tokens, attended, modulation, text)
            if store:
                context.layers[layer].extend((key.detach(), value.detach()) for key, value in new)
        self.updated = self.blocks
        if store and not self.recaching:
            self.is_new = self.record_all or self.blocks % self.interval == 0
            self.blocks += 1
        return self.head(tokens, embedding, *grid)
