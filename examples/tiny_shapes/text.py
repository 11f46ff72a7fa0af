"""Tokenizer and text encoder for the captions of the shapes world."""

import itertools

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES


MAX_SEQUENCE_LENGTH = 24
# Token of </s>, all that an empty caption is.
END = 1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; unknown words are <unk>."""
    words = ["<pad>", "</s>", "<unk>", "a", "an", "moves", "and", ",", "on", "background"]
    words = dict.fromkeys(itertools.chain(words, COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))
    vocabulary = {word: i for i, word in enumerate(words)}
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
            vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Long tensor `(N, MAX_SEQUENCE_LENGTH)`, padded."""
    return tokenizer(captions, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt").input_ids
