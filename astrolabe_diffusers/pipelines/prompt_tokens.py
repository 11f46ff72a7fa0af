"""Prompts as tokens."""

import logging
import threading
from functools import lru_cache

from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .scene_prompt import check_text


logger = logging.getLogger(__name__)
# Tokenizers keep padding and truncation in themselves: two threads at once end in "Already borrowed".
_TOKENIZING = threading.Lock()


@lru_cache(maxsize=1024)
def warn_once(message: str):
    """For what a user gave, which is often given many times."""
    logger.warning(message)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> BatchEncoding:
    """`input_ids` and `attention_mask` `(len(texts), length)`. Warns of each text that is cut."""
    for text in texts:
        check_text(text)
    texts = [prompt_clean(text) for text in texts]
    with _TOKENIZING:
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for text, mask in zip(texts, tokens.attention_mask):
            ids = tokenizer(text, verbose=False).input_ids if mask.all() else []
            if len(ids) > length:
                kept = length - tokenizer.num_special_tokens_to_add()
                removed = tokenizer.decode(ids[kept:], skip_special_tokens=True)
                if not removed.strip():  # spaces, or the tokens that end a text
                    continue
                end = " ..." if len(removed) > 500 else ""
                warn_once(
                    f"The following part of a prompt was cut off, because the model takes {length} tokens "
                    f"(max_sequence_length): {removed[:500]!r}{end}"
                )
    return tokens
