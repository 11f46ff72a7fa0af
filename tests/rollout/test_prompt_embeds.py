import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.files.writing import PARTIAL
from astrolabe_diffusers.rollout.prompt_embeds import StoredPromptEmbeds, encoder_digest


PROMPTS = ["a red circle moves left", "a blue square", "a green cross moves up on a white background"]


@pytest.fixture(scope="module")
def pipe(model_folder):
    return CausalWanPipeline.from_pretrained(model_folder)


@pytest.fixture
def stored(tmp_path, pipe):
    stored = StoredPromptEmbeds(tmp_path / "embeds", "0" * 64)
    stored.complete(PROMPTS, lambda: pipe.encode_prompt)
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_encoder_makes(dtype, pipe, tmp_path):
    stored = StoredPromptEmbeds(tmp_path, "0" * 64)
    stored.complete(PROMPTS, lambda: lambda prompt: pipe.encode_prompt(prompt, dtype=dtype))
    for prompt in PROMPTS:
        embeds = stored.read(prompt)
        assert embeds.dtype == dtype and torch.equal(embeds, pipe.encode_prompt(prompt, dtype=dtype))
    # Without what is zero: four tokens of 32 numbers, where there are 512.
    assert stored.path(PROMPTS[1]).stat().st_size < 4 * 32 * dtype.itemsize + 300


def test_only_what_is_missing_is_encoded_and_the_encoder_only_loaded_then(stored, pipe):
    stored.complete(PROMPTS, lambda: pytest.fail("the encoder was loaded"))
    encoded = []
    new = "a purple triangle"
    stored.complete([*PROMPTS, new, new], lambda: lambda prompt: encoded.append(prompt) or pipe.encode_prompt(prompt))
    assert encoded == [new] and torch.equal(stored.read(new), pipe.encode_prompt(new))
    with pytest.raises(UserError, match="'never seen', is missing or damaged"):
        stored.read("never seen")


def flip(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], flip, lambda data: b"[]" * 50])
def test_a_damaged_file_is_computed_anew(damage, stored, pipe):
    path = stored.path(PROMPTS[0])
    path.write_bytes(damage(path.read_bytes()))
    assert stored.find(PROMPTS[0]) is None
    stored.complete(PROMPTS, lambda: pipe.encode_prompt)
    assert torch.equal(stored.read(PROMPTS[0]), pipe.encode_prompt(PROMPTS[0]))


def test_a_file_has_its_name_once_it_is_whole(stored, pipe, monkeypatch):
    """Whatever ends the process before."""
    states = []

    def power_cut(path):
        states.append((path.name.endswith(PARTIAL), stored.find("new")))
        raise OSError(5, "no more")

    monkeypatch.setattr("astrolabe_diffusers.rollout.prompt_embeds.to_disk", power_cut)
    with pytest.raises(UserError, match="cannot write .*no more"):
        stored.write("new", pipe.encode_prompt("new"))
    assert states == [(True, None)] and stored.find("new") is None
    assert len(list(stored.folder.iterdir())) == len(PROMPTS)  # nor is there a part of it


def test_several_may_write_the_same_prompt(tmp_path, pipe):
    embeds = pipe.encode_prompt(PROMPTS[0])
    stored = StoredPromptEmbeds(tmp_path, "0" * 64)
    stored.write(PROMPTS[0], embeds)

    def write_and_read(_):
        stored.write(PROMPTS[0], embeds)
        return stored.find(PROMPTS[0])

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(write_and_read, range(80)))
    assert all(torch.equal(result, embeds) for result in results)
    assert list(stored.folder.iterdir()) == [stored.path(PROMPTS[0])]


def one_weight(folder):
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights[sorted(weights)[-1]].view(-1)[-1] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})


def one_token(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"circle"', '"circles"'))


def sequence_length(folder):
    file = folder / "model_index.json"
    file.write_text(file.read_text().replace('"max_sequence_length": 16', '"max_sequence_length": 15'))


@pytest.mark.parametrize("change", [one_weight, one_token, sequence_length])
def test_another_encoder_has_another_digest(change, model_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(model_folder, folder)
    before = encoder_digest(str(model_folder), torch.float32)
    assert encoder_digest(str(folder), torch.float32) == before  # a copy has the same
    assert encoder_digest(str(folder), torch.bfloat16) != before
    change(folder)
    assert encoder_digest(str(folder), torch.float32) != before


def test_a_folder_that_a_process_does_not_share(tmp_path):
    stored = StoredPromptEmbeds(tmp_path / "mine", "digest")
    stored.write("a", torch.ones(1, 2, 4))
    stored.check(["a"])
    with pytest.raises(UserError, match="mine: a process does not see the files of the others; it must be a folder"):
        stored.check(["a", "of another process"])


def test_embeddings_of_nothing_but_zeros(tmp_path):
    stored = StoredPromptEmbeds(tmp_path, "digest")
    stored.write("", torch.zeros(1, 3, 4))
    assert torch.equal(stored.find(""), torch.zeros(1, 3, 4))
