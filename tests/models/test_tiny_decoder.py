"""TinyWanDecoder against a slow decoder of the same file, and its pieces against the whole."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from astrolabe_diffusers import StreamingTinyDecoder, TinyWanDecoder
from astrolabe_diffusers.models import vae_streaming
from tests.tiny_decoder_files import slow_frames, tiny_decoder_tensors


def load(path, tensors, **kwargs) -> TinyWanDecoder:
    torch.save(tensors, path)
    return TinyWanDecoder.from_single_file(path, **kwargs)


@pytest.fixture
def model(tmp_path):
    return load(tmp_path / "taew2_1.pth", tiny_decoder_tensors())


def random_latents(frames=5, batch=2, channels=4, **options):
    return torch.randn(batch, channels, frames, 3, 4, **options)


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        (dict(), dict()),
        (dict(channels=6, growths=(2, 1, 2)), dict(growths=(2, 1, 2))),
        (dict(outputs=12), dict(patch=2)),
    ],
)
def test_equals_the_formulas(tmp_path, tensors, settings):
    tensors = {name: tensor.double() for name, tensor in tiny_decoder_tensors(**tensors).items()}
    growths = settings.get("growths", (1, 2, 2))
    model = load(tmp_path / "taew2_1.pth", tensors, temporal_growth=growths)
    latents = random_latents(channels=model.config.latent_channels, dtype=torch.float64)
    video = StreamingTinyDecoder(model).decode(latents)
    side = 8 * settings.get("patch", 1)
    assert video.shape == (2, 3, 17, 3 * side, 4 * side) and model.scale_factor_spatial == side
    # What is compared is seen: neither black nor white, and no frame as the other.
    assert (video.abs() < 1).float().mean() > 0.5 and (video[:, :, 1:] - video[:, :, :-1]).std() > 0.01
    expected = torch.stack([slow_frames(tensors, row, **settings) for row in latents])
    assert (video - expected).abs().max() < 1e-10


def test_pieces_equal_whole(model, monkeypatch):
    latents = random_latents()
    whole = StreamingTinyDecoder(model).decode(latents)
    for at_once in (1024, 1):
        monkeypatch.setattr(vae_streaming, "POSITIONS_AT_ONCE", at_once)
        for sizes in (5,), (1,) * 5, (2, 2, 1), (2, 3):
            decoder = StreamingTinyDecoder(model)
            pieces = [decoder.decode(piece) for piece in latents.split(sizes, dim=2)]
            assert [piece.shape[2] for piece in pieces] == [4 * f - 3 * (i == 0) for i, f in enumerate(sizes)]
            assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_what_is_remembered(model):
    """Nine frames, which a later piece does not change; without them another video comes."""
    latents = random_latents(3)
    _, memory = model(latents[:, :, :2])
    copies = [frame.clone() for frame in memory]
    widths = [width for width in model.config.block_out_channels[:3] for _ in range(3)]
    assert [frame.shape[-1] for frame in memory] == widths
    first, _ = model(latents[:, :, 2:], memory)
    again, _ = model(latents[:, :, 2:], memory)
    assert torch.equal(first, again) and all(map(torch.equal, memory, copies))
    for i in range(9):
        other = [frame + (i == j) for j, frame in enumerate(memory)]
        assert (model(latents[:, :, 2:], other)[0] - first).abs().max() > 1e-3
    decoder = StreamingTinyDecoder(model)
    video = decoder.decode(latents)
    decoder.reset()
    assert torch.equal(decoder.decode(latents), video)


def test_select(model):
    latents = random_latents(4, batch=3)
    expected = StreamingTinyDecoder(model).decode(latents)[[2, 0], :, 5:]
    decoder = StreamingTinyDecoder(model)
    assert decoder.select([1]).decode(latents[:1]).shape[2] == 13
    decoder.decode(latents[:, :, :2])
    other = decoder.select([2, 0])
    assert (other.decode(latents[[2, 0], :, 2:]) - expected).abs().max() < 1e-6
    # The one it comes from goes on by itself.
    assert (decoder.decode(latents[:, :, 2:])[[2, 0]] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(model, half):
    latents = random_latents(3)
    expected = StreamingTinyDecoder(model).decode(latents)
    decoder = StreamingTinyDecoder(model.to(half))
    with torch.autocast("cpu", torch.bfloat16):
        video = decoder.decode(latents)
    assert video.dtype == half and (video.float() - expected).abs().mean() < 0.01


def test_offloaded_layers(model):
    latents = random_latents(3)
    expected = StreamingTinyDecoder(model).decode(latents)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    decoder = StreamingTinyDecoder(model)
    pieces = [decoder.decode(piece) for piece in latents.split((2, 1), dim=2)]
    assert (torch.cat(pieces, dim=2) - expected).abs().max() < 1e-6


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """At the published widths, with the kernel that spreads pixels."""
    model = load(tmp_path / "taew2_1.pth", tiny_decoder_tensors(16, (256, 128, 64, 64)))
    latents = torch.randn(2, 16, 3, 6, 8)
    expected = StreamingTinyDecoder(model).decode(latents)
    for dtype, tolerance in {torch.float32: 2e-3, torch.bfloat16: 0.03}.items():
        decoder = StreamingTinyDecoder(model.to("cuda", dtype))
        video = torch.cat([decoder.decode(piece.cuda()).cpu() for piece in latents.split((1, 2), dim=2)], dim=2)
        assert (video - expected).abs().mean() < tolerance


def test_round_trip(model, tmp_path):
    StreamingTinyDecoder(model)  # which lays out its weights otherwise in memory
    model.save_pretrained(tmp_path / "saved")
    loaded = TinyWanDecoder.from_pretrained(tmp_path / "saved")
    latents = random_latents(2)
    assert torch.equal(loaded(latents)[0], model(latents)[0])
    assert TinyWanDecoder.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16


# Files


def test_published_file(tmp_path):
    """Its widths, its encoder, and a growth in time that was published for more frames."""
    tensors = tiny_decoder_tensors(16, (256, 128, 64, 64))
    tensors["decoder.7.conv.weight"] = torch.cat([torch.randn(256, 256, 1, 1), tensors["decoder.7.conv.weight"]])
    tensors |= {"encoder.0.weight": torch.randn(64, 3, 3, 3), "encoder.0.bias": torch.randn(64)}
    latents = torch.randn(1, 16, 2, 2, 3)
    expected = slow_frames(tensors, latents[0])
    torch.save(tensors, tmp_path / "taew2_1.pth")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "taew2_1.safetensors")
    for name, error in {"taew2_1.pth": 1e-5, "taew2_1.safetensors": 0.02}.items():
        model = TinyWanDecoder.from_single_file(tmp_path / name)
        assert tuple(model.config.block_out_channels) == (256, 128, 64, 64) and model.config.latent_channels == 16
        assert not model.training and model.dtype == (torch.float32 if name.endswith("pth") else torch.float16)
        video = StreamingTinyDecoder(model).decode(latents)[0]
        assert (video - expected).abs().max() < error
    assert TinyWanDecoder.from_single_file(tmp_path / "taew2_1.pth", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_denormalised_latents(tmp_path):
    """By the file's name, which may be another."""
    tensors, latents = tiny_decoder_tensors(channels=16), random_latents(channels=16)
    wan = AutoencoderKLWan(base_dim=4, num_res_blocks=0).config
    mean, std = (torch.tensor(wan[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = {False: slow_frames(tensors, latents[0]), True: slow_frames(tensors, latents[0] * std + mean)}
    assert (expected[True] - expected[False]).abs().max() > 0.1
    files = {"taew2_1": (False, {}), "lighttaew2_1": (True, {}), "LightTAEW-mine": (True, {})}
    files |= {f"mine-{said}": (said, {"denormalised": said}) for said in expected}
    for name, (denormalised, arguments) in files.items():
        model = load(tmp_path / f"{name}.pth", tensors, **arguments)
        video = StreamingTinyDecoder(model).decode(latents)[0]
        assert (video - expected[denormalised]).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(TinyWanDecoder.from_pretrained(tmp_path / "saved")(latents)[0], model(latents)[0])
    with pytest.raises(ValueError, match=r"^mine.pth may take normalised latents.*published name, or say denorm"):
        load(tmp_path / "mine.pth", tensors)
    with pytest.raises(ValueError, match="de-normalised latents of 4 channels, which are not Wan2.1's"):
        load(tmp_path / "lighttaew2_2.pth", tiny_decoder_tensors())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder.4.conv.2.bias": None, "decoder.13.conv.weight": None}, r"2 missing \(decoder.4.conv.2.bias, "),
        ({"decoder.23.weight": torch.ones(3)}, r"1 unexpected \(decoder.23.weight\)"),
        ({"decoder.9.conv.0.weight": torch.ones(6, 6, 3, 3)}, r"1 of another shape \(decoder.9.conv.0.weight \(6, "),
        ({"decoder.19.conv.weight": torch.ones(8, 8, 1, 1)}, r"decoder.19.conv.weight \(8, 8, 1, 1\) for \(16, 8, "),
        ({"decoder.22.weight": None}, r"no tiny decoder in the format of TAEHV: it has no decoder.22.weight\."),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, words):
    tensors = tiny_decoder_tensors() | change
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path / "taew2_1.pth", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(error.value)
