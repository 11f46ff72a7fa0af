"""A pipeline with a tiny decoder: its frames, its folder, and what it refuses."""

import json

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline, StreamingTinyDecoder, TinyWanDecoder
from astrolabe_diffusers.pipelines.loading import load_from, prepare_pipeline
from tests.tiny_decoder_files import tiny_decoder_tensors
from tests.tiny_pipeline import SMALL, model_index, save_tiny_pipeline, tiny_pipeline


PROMPTS = ["a red circle moves left on a black background", "a green cross moves up on a white background"]


def random_decoder(**sizes) -> TinyWanDecoder:
    tensors = tiny_decoder_tensors(**sizes)
    decoder = TinyWanDecoder(sizes.get("channels", 4), [24, 16, 8, 8])
    decoder.load_state_dict(tensors)
    return decoder.eval()


@pytest.fixture
def decoder():
    return random_decoder()


def generate(pipe, prompt=PROMPTS, output_type="pt", **kwargs):
    kwargs = {"num_frames": 21} | kwargs
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type=output_type, **kwargs).frames


def decoded(decoder, latents):
    """As the pipeline gives it."""
    return (StreamingTinyDecoder(decoder).decode(latents) / 2 + 0.5).transpose(1, 2)


def test_its_frames(decoder):
    pipe = tiny_pipeline(**SMALL)
    exact, latents = generate(pipe), generate(pipe, output_type="latent")
    pipe.tiny_decoder = decoder
    frames = generate(pipe)
    assert torch.equal(generate(pipe, output_type="latent"), latents)
    assert frames.shape == exact.shape and (frames - exact).abs().mean() > 0.05
    assert torch.equal(frames, decoded(decoder, latents))
    stream = pipe.stream(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt", num_frames=21)
    assert torch.equal(torch.cat(list(stream), dim=1), frames)
    pipe.tiny_decoder = None
    assert torch.equal(generate(pipe), exact)


def test_a_cut_of_one_video(decoder):
    """Its decoder forgets, and the other one's goes on."""
    pipe = tiny_pipeline(**SMALL, tiny_decoder=decoder)
    prompts = [f"{PROMPTS[0]} [0.75s#] | {PROMPTS[1]}", PROMPTS[1]]
    latents, frames = generate(pipe, prompts, "latent", num_frames=33), generate(pipe, prompts, num_frames=33)
    before, after = decoded(decoder, latents[:1, :, :3]), decoded(decoder, latents[:1, :, 3:])
    held = after[:, :1].expand(-1, 3, -1, -1, -1)
    assert (frames[:1] - torch.cat([before, held, after], dim=1)).abs().max() < 1e-5
    assert (frames[1:] - decoded(decoder, latents[1:])).abs().max() < 1e-5


@pytest.mark.parametrize("assigned", [False, True])
def test_round_trip(decoder, tmp_path, assigned):
    if assigned:
        pipe = tiny_pipeline(**SMALL)
        pipe.tiny_decoder = decoder
    else:
        pipe = tiny_pipeline(**SMALL, tiny_decoder=decoder)
    pipe.save_pretrained(tmp_path)
    assert model_index(tmp_path)["tiny_decoder"] == ["diffusers", "TinyWanDecoder"]
    loaded = load_from(str(tmp_path))
    assert torch.equal(generate(loaded), generate(pipe))
    assert CausalWanPipeline.from_pretrained(tmp_path, tiny_decoder=None).tiny_decoder is None
    assert load_from(str(tmp_path), dtype=torch.bfloat16).tiny_decoder.dtype == torch.bfloat16


def test_a_folder_of_before(decoder, tmp_path):
    """Its index knows nothing of it, and a decoder can be given."""
    save_tiny_pipeline(tmp_path, **SMALL)
    index = model_index(tmp_path)
    assert index.pop("tiny_decoder") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_from(str(tmp_path)).tiny_decoder is None
    pipe = load_from(str(tmp_path), tiny_decoder=decoder)
    assert pipe.tiny_decoder is decoder
    again = CausalWanPipeline.from_pipe(pipe)
    assert again.tiny_decoder is decoder and again.transformer is pipe.transformer


def test_it_goes_where_the_pipeline_goes(decoder):
    pipe = tiny_pipeline(**SMALL, tiny_decoder=decoder)
    prepare_pipeline(pipe, torch.device("cpu"), "none", vae_tiling=True, attention_backend=None)
    expected = generate(pipe)
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert (generate(pipe) - expected).abs().max() < 1e-4
    pipe = tiny_pipeline(**SMALL, tiny_decoder=random_decoder()).to(torch.bfloat16)
    assert pipe.tiny_decoder.dtype == torch.bfloat16
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda pipe: random_decoder(channels=16), r"another autoencoder.*\(16, 4, 8\) a latent.*\(4, 4, 8\)"),
        (lambda pipe: TinyWanDecoder(4, [8] * 4, [2, 2, 2]), r"\(4, 8, 8\) a latent"),
        (lambda pipe: pipe.vae, "is a AutoencoderKLWan, but must be a TinyWanDecoder"),
    ],
)
def test_another_autoencoders(make, words):
    pipe = tiny_pipeline(**SMALL)
    pipe.tiny_decoder = make(pipe)
    with pytest.raises(ValueError, match=words):
        generate(pipe)
    with pytest.raises(ValueError, match=words):
        CausalWanPipeline(**pipe.components)


def test_a_context_of_exact_frames(decoder):
    with pytest.raises(ValueError, match="cannot be used with `num_context_frames`"):
        tiny_pipeline(**SMALL, num_context_frames=3, tiny_decoder=decoder)
