"""Prompts that are cut, and texts that are no prompts."""

import logging
import threading
import time

import pytest
import torch
from diffusers import WanPipeline

from tests.pipelines.test_scenes import A
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_layers=1, vae_num_res_blocks=0)


def words(number):
    return " ".join(["red", "green", "blue", "yellow"][i % 4] for i in range(number))


def test_what_is_cut_is_said_once(pipe, caplog):
    """15 words and the end fit into 16 tokens. diffusers' own pipeline says what is removed."""
    fits, cut = words(15), words(15) + " purple circle"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            embeds = pipe.encode_prompt([fits, cut])
    assert [record.getMessage() for record in caplog.records] == [
        "The following part of a prompt was cut off, because the model takes 16 tokens (max_sequence_length): "
        "'purple circle'"
    ]
    wan = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, pipe.transformer)
    with torch.no_grad():
        expected, _ = wan.encode_prompt([fits, cut], do_classifier_free_guidance=False, max_sequence_length=16)
    assert torch.equal(embeds, expected)


def test_what_is_cut_and_says_nothing_is_not_said(pipe, caplog):
    """Here the end of the text alone."""
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt([f"{words(15)} </s></s></s>"])
    assert not caplog.records


def test_scenes_and_new_prompts_too(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        stream = pipe.stream(f"{A} [.75s] | {words(15)} cross [.75s]", output_type="latent")
        assert "'cross'" in caplog.text
        stream.set_prompt(words(16) + " square")
        list(stream)
    assert "'yellow square'" in caplog.text


@pytest.mark.parametrize("length", [0, -1, 513, 10**9, 5.0, "16"])
def test_lengths(pipe, length):
    message = f"`max_sequence_length` must be from 1 to 512 tokens, not {length}"
    for call in (pipe, pipe.stream, pipe.encode_prompt):
        with pytest.raises(ValueError, match=message):
            call(A, max_sequence_length=length)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(max_sequence_length=length)
    assert pipe.encode_prompt(A, max_sequence_length=512).shape == (1, 512, 32)


@pytest.mark.parametrize(
    "text,message",
    [
        ("x" * 1_000_000, "a prompt of 1000000 characters: at most 100000"),
        ("a caf\udce9", "prompt, character 6: half of a surrogate pair"),
        (3, "3 is no text"),
    ],
)
def test_no_prompt(pipe, text, message):
    started = time.perf_counter()
    stream = pipe.stream(A)
    for call in (pipe, pipe.stream, pipe.encode_prompt, stream.set_prompt, pipe.default_num_frames):
        with pytest.raises(ValueError, match=message) as error:
            call([text])
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert time.perf_counter() - started < 5


def test_the_longest_text_is_read_at_once(pipe):
    """Character by character it took a third of a second."""
    started = time.perf_counter()
    assert pipe.default_num_frames("a \\[red\\] circle | " * 5000 + "a") > 21
    assert time.perf_counter() - started < 5


def test_the_empty_prompt_is_a_prompt(pipe):
    assert pipe("", num_frames=9, output_type="latent").frames.isfinite().all()


def test_tokenizing_in_threads(pipe):
    """A fast tokenizer keeps length and padding in itself."""
    expected = {length: pipe.encode_prompt(A, max_sequence_length=length) for length in (12, 16)}
    wrong = []

    def encode(length):
        for _ in range(50):
            if not torch.equal(pipe.encode_prompt(A, max_sequence_length=length), expected[length]):
                wrong.append(length)

    threads = [threading.Thread(target=encode, args=(length,)) for length in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
