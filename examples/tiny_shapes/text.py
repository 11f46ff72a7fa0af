"""Tokenizer and text encoder for the captions of the shapes world."""

import itertools
import math

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from astrolabe_diffusers.rewards.metrics.tiny_shapes import ATTRIBUTES, caption


MAX_SEQUENCE_LENGTH = 16


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; unknown words are <unk>."""
    names = (ATTRIBUTES[name] for name in ("color", "shape", "direction", "background"))
    words = ["<pad>", "</s>", "<unk>", "a", "moves", "on", "background", *itertools.chain(*names)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )


class CaptionTokens:
    """Token ids of every caption, looked up by attribute indices `(B, 4)`: color, shape, background, direction.

    Negative indices stand for no caption, which guidance needs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device):
        sizes = [len(values) for values in ATTRIBUTES.values()]
        self.strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))], device=device)
        captions = [caption(*names) for names in itertools.product(*ATTRIBUTES.values())]
        tokens = tokenizer(
            captions + [""], padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
        )
        self.input_ids, self.mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def __call__(self, attributes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = (attributes * self.strides).sum(dim=1).where(attributes[:, 0] >= 0, -1)
        return self.input_ids[index], self.mask[index]
