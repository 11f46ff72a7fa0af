"""What is read is what was written, from every kind of file; what is none is told in one line."""

import argparse
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from astrolabe_diffusers.layouts.tensor_files import fetch_link, load_tensors


TENSORS = {
    "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b": torch.tensor(3),
    "c": torch.tensor([1.5, -448.0]).to(torch.float8_e4m3fn),
    "d": torch.empty(0, dtype=torch.float8_e5m2),
    "e": torch.arange(4, dtype=torch.int8),
    "f": torch.tensor([0.1, 2.0], dtype=torch.bfloat16),
}


def write_shards(folder, suffix, save):
    names = list(TENSORS)
    stem, files = "diffusion_pytorch_model", {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        save({name: TENSORS[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def torch_file(folder, name):
    torch.save(TENSORS, folder / name)
    return folder / name


def safetensors_file(folder, name):
    save_file(TENSORS, folder / name)
    return folder / name


FILES = {
    "torch": lambda d: torch_file(d, "m.pt"),
    "safetensors": lambda d: safetensors_file(d, "m.safetensors"),
    "safetensors under another name": lambda d: safetensors_file(d, "m.ckpt"),
    "folder": lambda d: torch_file(d, "diffusion_pytorch_model.bin").parent,
    "shards": lambda d: write_shards(d, "safetensors", save_file),
    "shards of torch": lambda d: write_shards(d, "bin", torch.save),
    "index": lambda d: write_shards(d, "safetensors", save_file) / "diffusion_pytorch_model.safetensors.index.json",
}


@pytest.mark.parametrize("map_files", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file(kind, map_files, tmp_path):
    loaded = load_tensors(FILES[kind](tmp_path), map_files)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].float(), tensor.float())


def test_before_torch_1_6(tmp_path):
    """The old format has no 8-bit floats."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if "float8" not in str(tensor.dtype)}
    torch.save(tensors, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    loaded = load_tensors(tmp_path / "m.pth")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def file_behind(tensor):
    """The file that the memory of a tensor is a map of, if it is one, as Linux lists them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return Path(line.split()[-1]).name
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists memory maps")
def test_files_are_mapped(tmp_path):
    """However many shards there are, no memory is needed for what is not used."""
    folder = write_shards(tmp_path, "safetensors", save_file)
    assert file_behind(load_tensors(folder)["a.weight"]) == "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert file_behind(load_tensors(folder)["e"]) == "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert file_behind(load_tensors(folder)["f"]) == "diffusion_pytorch_model-00002-of-00002.safetensors"
    assert file_behind(load_tensors(torch_file(tmp_path, "m.pt"))["f"]) == "m.pt"
    for path in (folder, tmp_path / "m.pt"):
        read = load_tensors(path, map_files=False).values()
        assert not any(str(file_behind(tensor)).startswith(("diffusion", "m.pt")) for tensor in read)


def safetensors_bytes(**entries):
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(12)


def info(dtype="F32", shape=(3,), offsets=(0, 12)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def saved(thing, folder, **kwargs):
    torch.save(thing, folder / "saved", **kwargs)
    return (folder / "saved").read_bytes()


def archive(folder):
    with zipfile.ZipFile(folder / "archive", "w") as file:
        file.writestr("x.txt", "y")
    return (folder / "archive").read_bytes()


OLD = {"_use_new_zipfile_serialization": False}
REFUSED = {
    "GGUF": (lambda d: b"GGUF" + bytes(64), "is a GGUF file, which is not supported"),
    "LFS": (lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "HTML": (lambda d: b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "XML": (lambda d: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "JSON": (lambda d: b'{"error": "Repository not found"}', "is a JSON text"),
    "empty": (lambda d: b"", "no readable checkpoint|holds what are no tensors"),
    "text": (lambda d: b"no checkpoint", "no readable checkpoint|holds what are no tensors"),
    "a list": (lambda d: saved([TENSORS], d), "holds a list, not tensors by name"),
    "a tensor": (lambda d: saved(torch.zeros(2), d), "holds a Tensor, not tensors by name"),
    "numbers for names": (lambda d: saved({0: torch.zeros(2)}, d), "holds a dict, not tensors by name"),
    "code": (
        lambda d: saved({"args": argparse.Namespace(), **TENSORS}, d),
        "holds argparse.Namespace beside tensors: loading it would run code from the file, which is refused",
    ),
    "code, old": (lambda d: saved({"args": argparse.Namespace()}, d, **OLD), "would run code"),
    "zip": (archive, "no readable checkpoint"),
    "torn zip": (lambda d: saved(TENSORS, d)[:-50], "no readable checkpoint"),
    "torn old": (lambda d: saved({"a": torch.zeros(99)}, d, **OLD)[:-5], "no readable checkpoint"),
    "old, hardly begun": (lambda d: saved({"a": torch.zeros(99)}, d, **OLD)[:100], "no readable checkpoint: it ends"),
    "shape is text": (lambda d: safetensors_bytes(a=info(shape="text")), "no readable checkpoint"),
    "negative shape": (lambda d: safetensors_bytes(a=info(shape=(-3,))), "no readable checkpoint"),
    "no shape": (lambda d: safetensors_bytes(a={"dtype": "F32"}), "no readable checkpoint"),
    "offsets past the end": (lambda d: safetensors_bytes(a=info(offsets=(0, 1200))), "no readable checkpoint"),
    "dtype of the future": (lambda d: safetensors_bytes(a=info("F12")), "no readable checkpoint"),
    "4-bit": (lambda d: safetensors_bytes(a=info("F4", (24,))), "a is of dtype F4, which is not supported"),
    "torn safetensors": (lambda d: safetensors_bytes(a=info())[:-1], "no readable checkpoint"),
    "header that is none": (lambda d: (9).to_bytes(8, "little") + b"{{{{{{{{{", "no readable checkpoint"),
    "header longer than the file": (lambda d: (10**9).to_bytes(8, "little") + b"{}", "no readable checkpoint"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_checkpoint(kind, suffix, tmp_path):
    make, message = REFUSED[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(make(tmp_path))
    if suffix == ".safetensors" and "of the file" not in kind:
        message += "|no readable checkpoint"  # a torch file under that name
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_a_header_of_15_kilobytes_is_no_web_page(tmp_path):
    """The length of a header may begin with the bytes of a blank and of `<`."""
    entries = {"a": info(), "__metadata__": {"x": ""}}
    missing = 0x3C20 - len(json.dumps(entries))
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(**entries | {"__metadata__": {"x": "x" * missing}}))
    assert (tmp_path / "m.safetensors").read_bytes()[:2] == b" <"
    assert torch.equal(load_tensors(tmp_path / "m.safetensors")["a"], torch.zeros(3))


def test_folders_and_indices(tmp_path):
    with pytest.raises(ValueError, match="holds no weights: there is no diffusion_pytorch_model.safetensors, no "):
        load_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tensors(tmp_path / "nothing.pt")
    index = tmp_path / "m.safetensors.index.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tensors(index)

    def fails(text, message):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tensors(tmp_path)

    fails("nothing", "is no index of weight files")
    fails("[]", "is no index of weight files")
    fails('{"weight_map": {"a": 3}}', "is no index of weight files")
    fails('{"weight_map": {"a": "../secret.safetensors"}}', "names ../secret.safetensors, which is no file beside it")
    fails('{"weight_map": {"a": "1.safetensors"}}', "lacks 1.safetensors, which its m.safetensors.index.json names")
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    fails('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "two files of .* hold a")


def test_links(monkeypatch):
    asked = []

    def download(repo, weights_name, revision, **hub):
        asked.append((repo, weights_name, revision, hub))
        return "downloaded"

    monkeypatch.setattr("astrolabe_diffusers.layouts.tensor_files._get_model_file", download)
    assert fetch_link("https://huggingface.co/o/n/blob/main/a/m.pt", token="t") == "downloaded"
    fetch_link("https://huggingface.co/o/n/resolve/abc/m.pt?download=true")
    fetch_link("hf.co/o/n/m.pt", revision="v1")
    assert asked == [
        ("o/n", "a/m.pt", "main", {"token": "t"}),
        ("o/n", "m.pt", "abc", {}),
        ("o/n", "m.pt", "v1", {}),
    ]
    assert fetch_link("folder/m.pt") == "folder/m.pt"
    with pytest.raises(ValueError, match="https://example.com/m.pt is no link to a file on the Hub"):
        fetch_link("https://example.com/m.pt")
