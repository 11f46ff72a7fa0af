"""Frames of latent frames, counted out."""

from astrolabe_diffusers.models.latent_frames import num_frames_of, num_latents_of
from tests.tiny_pipeline import tiny_pipeline


def test_against_counting():
    vae = tiny_pipeline().vae
    # The latent frame of every frame, and the frame that each is whole with.
    latents = [0] + [latent for latent in range(1, 9) for _ in range(vae.config.scale_factor_temporal)]
    whole_with = {latent: number for number, latent in enumerate(latents, 1)}
    for number in range(1, len(latents) + 1):
        assert num_latents_of(vae, number) == sum(last <= number for last in whole_with.values())
    for number in range(10):
        assert num_frames_of(vae, number) == sum(latent < number for latent in latents)
