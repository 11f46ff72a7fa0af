"""Piecewise decoding against decoding whole, bit for bit, and against AutoencoderKLWan's own."""

import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from peft import LoraConfig, inject_adapter_in_model

from astrolabe_diffusers import StreamingVAEDecoder
from astrolabe_diffusers.models import vae_encoder, vae_streaming
from astrolabe_diffusers.models.vae_streaming import FusedWanRMSNorm, decode_latents, encode_video, use_channels_last
from tests.tiny_pipeline import LATENT_CHANNELS, random_vae, tiny_vae


pytestmark = pytest.mark.usefixtures("no_grad")
VARIANTS = {
    "wan2.1": dict(),
    "patched": dict(patch_size=2),
    "wan2.2": dict(patch_size=2, is_residual=True),
}


@pytest.fixture(params=VARIANTS)
def vae(request):
    return tiny_vae(**VARIANTS[request.param])


def raw(vae, latents):
    """Latents as the autoencoder takes them."""
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return latents * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)


def normalised(vae, latents):
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


def random_latents(frames=5, batch=2, height=4, width=6):
    """Not smaller: for a handful of pixels PyTorch's convolution rounds one frame unlike the same frame among many."""
    return torch.randn(batch, LATENT_CHANNELS, frames, height, width)


@pytest.mark.usefixtures("diffusers_norm")
def test_pieces_equal_whole(vae):
    latents = random_latents()
    expected = vae.decode(raw(vae, latents)).sample
    scale = vae.config.scale_factor_spatial
    assert expected.shape == (2, 3, 17, 4 * scale, 6 * scale)
    assert expected.abs().max() <= 1
    whole = decode_latents(vae, latents)
    # Our decoder takes the sums of a convolution in another order; in float64 it is equal (test_vae_decoder.py).
    assert (whole - expected).norm() < 1e-5 * expected.norm()
    for sizes in (5,), (1,) * 5, (2, 2, 1), (2, 3):
        decoder = StreamingVAEDecoder(vae)
        pieces = [decoder.decode(piece) for piece in latents.split(sizes, dim=2)]
        assert [piece.shape[2] for piece in pieces] == [4 * f - 3 * (i == 0) for i, f in enumerate(sizes)]
        assert torch.equal(torch.cat(pieces, dim=2), whole)


@pytest.mark.parametrize("sizes", [pytest.param((4,), marks=pytest.mark.slow), (2, 1, 1)])
def test_tiles_equal_tiled_whole(vae, sizes):
    scale = vae.spatial_compression_ratio
    latents = random_latents(frames=4, height=7, width=7)
    untiled = decode_latents(vae, latents[:, :, :1])
    vae.enable_tiling(4 * scale, 6 * scale, 3 * scale, 4 * scale)
    whole = vae.decode(raw(vae, latents)).sample
    assert (whole[:, :, :1] - untiled).abs().max() > 1e-3
    decoder = StreamingVAEDecoder(vae)
    pieces = torch.cat([decoder.decode(piece) for piece in latents.split(sizes, dim=2)], dim=2)
    # Diffusers passes the latent frames of a tile one by one through a 1x1 convolution, which may round otherwise.
    assert (pieces - whole).abs().max() < 1e-4


def test_memory_matters(vae):
    """Forgetting the past at a cut gives other frames: the equality above is not one of independent pieces."""
    latents = random_latents(4)
    decoder = StreamingVAEDecoder(vae)
    decoder.decode(latents[:, :, :3])
    remembered = decoder.decode(latents[:, :, 3:])
    decoder.reset()
    assert remembered.shape[2] == 4
    assert decoder.decode(latents[:, :, 3:]).shape[2] == 1
    other = StreamingVAEDecoder(vae)
    other.decode(random_latents(3))
    assert (other.decode(latents[:, :, 3:]) - remembered).abs().max() > 1e-3


def test_select(vae):
    latents = random_latents(4, batch=3)
    expected = StreamingVAEDecoder(vae).decode(latents)[[2, 0], :, 5:]
    for calls in (False, True):
        if calls:
            vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        decoder = StreamingVAEDecoder(vae)
        decoder.decode(latents[:, :, :2])
        other = decoder.select([2, 0])
        assert (other.decode(latents[[2, 0], :, 2:]) - expected).abs().max() < 1e-4
        # The one it comes from goes on by itself.
        assert (decoder.decode(latents[:, :, 2:])[[2, 0]] - expected).abs().max() < 1e-4


def test_whole_videos_with_gradients_and_one_by_one(vae):
    latents = random_latents(2)
    expected = decode_latents(vae, latents)
    vae.enable_slicing()
    assert (decode_latents(vae, latents) - expected).abs().max() < 1e-4
    with torch.enable_grad():
        decode_latents(vae, latents.requires_grad_()).square().mean().backward()
    assert latents.grad.abs().min() > 0


def test_reset_starts_a_video(vae):
    latents = random_latents(3)
    decoder = StreamingVAEDecoder(vae)
    first = decoder.decode(latents)
    decoder.decode(random_latents(2))
    decoder.reset()
    assert torch.equal(decoder.decode(latents), first)


def test_streams_do_not_disturb_each_other(vae):
    videos = [random_latents(4), random_latents(4, batch=1, height=6, width=4)]
    expected = [vae.decode(raw(vae, video)).sample for video in videos]
    decoders = [StreamingVAEDecoder(vae) for _ in videos]
    pieces = [[], []]
    for start in range(0, 4, 2):
        for i, video in enumerate(videos):
            pieces[i].append(decoders[i].decode(video[:, :, start : start + 2]))
            # Another user of the autoencoder: both calls clear its own feature memory.
            decode_latents(vae, random_latents(2, batch=1))
            scale = vae.config.scale_factor_spatial
            encode_video(vae, torch.rand(1, 3, 5, 2 * scale, 2 * scale) * 2 - 1)
    for piece, whole in zip(pieces, expected):
        torch.testing.assert_close(torch.cat(piece, dim=2), whole, atol=1e-4, rtol=0)


def test_encode_video(vae):
    scale = vae.config.scale_factor_spatial
    video = torch.rand(2, 3, 9, 2 * scale, 3 * scale) * 2 - 1
    latents = encode_video(vae, video)
    assert latents.shape == (2, LATENT_CHANNELS, 3, 2, 3)
    assert latents.dtype == torch.float32
    # The posterior's mean is the first half of the moments.
    moments = vae.encode(video).latent_dist.parameters
    assert torch.allclose(raw(vae, latents), moments[:, :LATENT_CHANNELS], atol=1e-6)
    vae.enable_slicing()
    assert torch.allclose(encode_video(vae, video), latents, atol=1e-5)


@pytest.mark.parametrize("together", [1, 2, 100])
@pytest.mark.parametrize("frames", [1, 2, 5, 12, 13, 16])
def test_frames_that_are_encoded_together(vae, frames, together, monkeypatch):
    """One or many latents a call: only rounding differs. Frames after the last 1 + 4 n count as little as to
    diffusers."""
    scale = vae.config.scale_factor_spatial
    monkeypatch.setattr(vae_streaming, "POSITIONS_AT_ONCE", 6 * together)
    video = torch.rand(1, 3, frames, 2 * scale, 3 * scale) * 2 - 1
    latents = encode_video(vae, video)
    assert latents.shape[2] == 1 + (frames - 1) // 4
    assert torch.allclose(raw(vae, latents), vae.encode(video).latent_dist.mode(), atol=1e-5)


def test_diffusers_encodes_tiles_gradients_and_offloaded_layers(vae):
    scale = vae.config.scale_factor_spatial
    video = torch.rand(1, 3, 5, 2 * scale, 3 * scale) * 2 - 1
    expected = vae.encode(video).latent_dist.mode()
    with torch.enable_grad():
        leaf = video.clone().requires_grad_()
        latents = encode_video(vae, leaf)
        latents.square().sum().backward()
    assert torch.equal(latents.detach(), normalised(vae, expected))
    assert leaf.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 0
    vae.enable_tiling(scale, scale, scale, scale)
    tiled = vae.encode(video).latent_dist.mode()
    assert (tiled - expected).abs().max() > 1e-3
    assert torch.equal(encode_video(vae, video), normalised(vae, tiled))
    vae.disable_tiling()
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(encode_video(vae, video), normalised(vae, expected))


def test_encoding_under_autocast_and_in_bfloat16(vae):
    scale = vae.config.scale_factor_spatial
    video = torch.rand(1, 3, 9, 2 * scale, 3 * scale) * 2 - 1
    expected = encode_video(vae, video)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_video(vae, video), expected)
    vae.bfloat16()
    latents = encode_video(vae, video)
    assert latents.dtype == torch.float32 and 0 < (latents - expected).abs().mean() < 0.02


def test_bfloat16(vae):
    latents = random_latents(2, batch=1)
    expected = decode_latents(vae, latents)
    vae.to(torch.bfloat16)
    out = StreamingVAEDecoder(vae).decode(latents)
    assert out.dtype == torch.bfloat16 and torch.equal(out, decode_latents(vae, latents))
    assert (out.float() - expected).abs().mean() < 0.02


@pytest.mark.usefixtures("diffusers_norm")
def test_channels_last_changes_nothing():
    vae = tiny_vae()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    latents = random_latents(7)
    latents = raw(vae, latents)
    expected = vae.decode(latents).sample
    parameters = {name: parameter.clone() for name, parameter in vae.state_dict().items()}
    use_channels_last(vae.decoder)
    assert (vae.decode(latents).sample - expected).abs().max() < 1e-4
    assert any(isinstance(module, FusedWanRMSNorm) for module in vae.decoder.modules())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in vae.state_dict().items())


@pytest.mark.parametrize("by_calls", [False, True])
def test_threads_do_not_share_what_the_encoder_remembers(by_calls, monkeypatch):
    """Another thread encodes while the first is in the midst of its video; diffusers' own encoder lets it wait."""
    vae, videos = tiny_vae(), [torch.rand(1, 3, 9, 16, 16) * 2 - 1 for _ in range(2)]
    monkeypatch.setattr(vae_streaming, "POSITIONS_AT_ONCE", 1)
    expected, results, threads = [encode_video(vae, video) for video in videos], {}, []

    @torch.no_grad()  # which is a thread's own
    def encode_other():
        results["other"] = encode_video(vae, videos[1])

    def meanwhile(*_):
        if not threads:
            threads.append(threading.Thread(target=encode_other))
            threads[0].start()
            threads[0].join(timeout=0.5)
            assert by_calls == threads[0].is_alive()

    def middle_block(*args, ours=vae_encoder.middle_block):
        meanwhile()
        return ours(*args)

    monkeypatch.setattr(vae_encoder, "middle_block", middle_block)
    if by_calls:
        vae.encoder.register_forward_hook(meanwhile)
    results["first"] = encode_video(vae, videos[0])
    threads[0].join()
    # Diffusers' encoder takes the sums of a convolution in another order.
    assert all(torch.allclose(results[name], wanted, atol=1e-5) for name, wanted in zip(("first", "other"), expected))


# What may run where the autoencoder's own code does not


def halve(module, args, output):
    return output / 2


def with_hook(vae):
    vae.decoder.mid_block.resnets[0].register_forward_hook(halve)
    vae.encoder.mid_block.resnets[0].register_forward_hook(halve)


def with_hook_before(vae):
    for module in (vae.post_quant_conv, vae.encoder.conv_out):
        module.register_forward_pre_hook(lambda module, args: (args[0] / 2, *args[1:]))


def with_forward_of_its_own(vae):
    class Folded(type(vae.decoder.mid_block)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).abs()

    vae.decoder.mid_block.__class__ = vae.encoder.mid_block.__class__ = Folded


def with_another_activation(vae):
    vae.decoder.nonlinearity, vae.encoder.nonlinearity = torch.nn.GELU(), torch.nn.GELU()


def with_forward_of_one_module(vae):
    for conv in (vae.decoder.conv_in, vae.encoder.conv_in):
        conv.forward = lambda *args, own=conv.forward: own(*args) / 2


def with_lora(vae):
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["resample.1"])
    inject_adapter_in_model(config, vae)


CHANGES = {
    change.__name__: change
    for change in (
        *(with_hook, with_hook_before, with_forward_of_its_own, with_another_activation),
        *(with_forward_of_one_module, with_lora),
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_users_have_put_in_counts(vae, change):
    """Also what comes after the decoder was made and has decoded."""
    latents, scale = random_latents(3), vae.config.scale_factor_spatial
    video = torch.rand(1, 3, 5, 2 * scale, 3 * scale) * 2 - 1
    decoder = StreamingVAEDecoder(vae)
    before, encoded = decoder.decode(latents), encode_video(vae, video)
    CHANGES[change](vae)
    expected = vae.decode(raw(vae, latents)).sample
    assert (expected - before).abs().max() > 1e-3
    decoder.reset()
    pieces = torch.cat([decoder.decode(piece) for piece in latents.split([1, 2], dim=2)], dim=2)
    # Diffusers' own code, but the frames of a piece together.
    assert (pieces - expected).abs().max() < 1e-4
    assert (decode_latents(vae, latents) - expected).abs().max() < 1e-4
    expected = normalised(vae, vae.encode(video).latent_dist.mode())
    assert (expected - encoded).abs().max() > 1e-3
    assert torch.equal(encode_video(vae, video), expected)


@pytest.mark.parametrize("compile_it", ["whole", "inside", "wrapped"])
def test_a_decoder_that_is_compiled_runs(compile_it):
    vae = random_vae(num_res_blocks=0, dim_mult=[1, 1], temperal_downsample=[True]).float()
    latents = random_latents(3, batch=1)
    expected = decode_latents(vae, latents)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if compile_it == "whole":
        vae.decoder.compile(backend=backend)
    elif compile_it == "inside":
        vae.decoder.up_blocks[-1].compile(backend=backend)
    else:
        vae.decoder = torch.compile(vae.decoder, backend=backend)
    decoder = StreamingVAEDecoder(vae)
    frames = torch.cat([decoder.decode(piece) for piece in latents.split([1, 2], dim=2)], dim=2)
    torch._dynamo.reset()
    assert graphs and (frames - expected).abs().max() < 1e-4


def test_hooks_in_the_midst_of_a_video(vae):
    """What is remembered is of another kind then. Hooks may go: what was begun by calls goes on so."""
    latents, decoder = random_latents(3), StreamingVAEDecoder(vae)
    expected = decoder.decode(latents)
    decoder.reset()
    decoder.decode(latents[:, :, :1])
    hook = vae.decoder.conv_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as error:
        decoder.decode(latents[:, :, 1:])
    assert "before it begins" in str(error.value) and "\n" not in str(error.value)
    decoder.reset()
    first = decoder.decode(latents[:, :, :1])
    hook.remove()
    frames = torch.cat([first, decoder.decode(latents[:, :, 1:])], dim=2)
    assert (frames - expected).abs().max() < 1e-4


def test_offloading_that_ends_leaves_nothing_behind(vae, monkeypatch):
    latents, used = random_latents(2), []
    expected = decode_latents(vae, latents)
    cpu_offload(vae, torch.device("cpu"))
    for name in ("decode_piece", "decode_piece_by_calls"):
        monkeypatch.setattr(
            vae_streaming, name, lambda *args, f=getattr(vae_streaming, name): used.append(f.__name__) or f(*args)
        )
    for wanted in ("decode_piece_by_calls", "decode_piece"):
        assert (StreamingVAEDecoder(vae).decode(latents) - expected).abs().max() < 1e-4
        assert set(used) == {wanted}
        used.clear()
        remove_hook_from_module(vae, recurse=True)


def test_a_class_with_methods_of_its_own():
    class Darker(AutoencoderKLWan):
        def decode(self, z, return_dict=True):
            sample = super().decode(z, return_dict=False)[0] - 0.5
            return DecoderOutput(sample=sample) if return_dict else (sample,)

        def _encode(self, x):
            return super()._encode(x / 2)

    vae, latents = tiny_vae(), random_latents(2)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    decoded, encoded = decode_latents(vae, latents), vae.encode(video / 2).latent_dist.mode()
    vae.__class__ = Darker
    assert (decode_latents(vae, latents) - (decoded - 0.5)).abs().max() < 1e-4
    assert torch.equal(encode_video(vae, video), normalised(vae, encoded))
    with pytest.raises(ValueError) as error:
        StreamingVAEDecoder(vae).decode(latents)
    assert "Darker" in str(error.value) and "\n" not in str(error.value)
