"""Prompts as tokens, and what cannot be a prompt."""

from __future__ import annotations

import threading
from numbers import Integral

from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .warn_once import warn_once


# What UMT5 and the Wan models were trained with. Longer ones are made by nobody, and the padding costs memory.
MAX_SEQUENCE_LENGTH = 512
# 512 tokens are about 2500; a text may have many scenes. What is far beyond is a file passed for a prompt.
MAX_CHARACTERS = 100_000
# Tokenizers keep padding and truncation in themselves: two threads at once end in "Already borrowed".
_TOKENIZING = threading.Lock()


def check_text(text: str):
    """
    Raises:
        ValueError: it is no text, or longer than `MAX_CHARACTERS`.
    """
    if not isinstance(text, str):
        raise ValueError(f"a prompt has to be a `str`, and {text!r} is no text.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a prompt of {len(text)} characters: at most {MAX_CHARACTERS}; is it a file's content?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt, character {error.start + 1}: half of a surrogate pair, which is no character; were its bytes in "
            "UTF-8?"
        ) from None


def check_sequence_length(length: int):
    if not isinstance(length, Integral) or not 1 <= length <= MAX_SEQUENCE_LENGTH:
        raise ValueError(f"`max_sequence_length` must be from 1 to {MAX_SEQUENCE_LENGTH} tokens, not {length}.")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> BatchEncoding:
    """`input_ids` and `attention_mask` `(len(texts), length)`. Warns of each text that is cut."""
    texts = [prompt_clean(text) for text in texts]
    with _TOKENIZING:
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for text, mask in zip(texts, tokens.attention_mask):
            if mask.all():
                _warn_if_cut(tokenizer, text, length)
    return tokens


def _warn_if_cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int):
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) > length:
        removed = tokenizer.decode(ids[length - tokenizer.num_special_tokens_to_add() :], skip_special_tokens=True)
        end = " ..." if len(removed) > 500 else ""
        warn_once(
            f"The following part of a prompt was cut off, because the model takes {length} tokens "
            f"(max_sequence_length): {removed[:500]!r}{end}"
        )
