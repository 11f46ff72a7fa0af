import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.samples import Trajectory, VideoBatch
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.cm_grpo import CMGRPOConfig
from astrolabe_diffusers.training.down_sampling import trained_part
from astrolabe_diffusers.training.forward_process.noising import NoisedBatch, noise_batch
from astrolabe_diffusers.training.nft.loss import optimality
from astrolabe_diffusers.training.nft.trainer import NFTBatch, accumulate_gradients
from astrolabe_diffusers.training.policies import policy_parameters
from tests.training.helpers import config, make_samples, numbers_of_run, policy_pipeline, tiny_settings


ADVANTAGES = torch.tensor([0.5, -2.0, 0.1, 3.0, -0.2, -1.0, 0.0, 0.9])
BEST_AND_WORST = [1, 3, 5, 7]
SIGMAS = torch.tensor([0.9375, 0.8333, 0.625])


def video_batch(pipe=None, **values) -> VideoBatch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 6, 4, 4, generator=generator)
    return VideoBatch(
        make_samples(8), torch.randn(8, 16, 32, generator=generator), latents, None, pipeline=pipe, **values
    )


def part_of(batch: VideoBatch, **settings):
    settings = config(train_batch_size=8, **settings)
    return trained_part(batch, ADVANTAGES, {"row": torch.arange(8), "advantage": ADVANTAGES}, settings)


def test_the_videos_farthest_from_the_mean_are_trained():
    batch = video_batch()
    part, values = part_of(batch, trained_fraction=0.5)
    assert values["row"].tolist() == BEST_AND_WORST
    assert torch.equal(values["advantage"], ADVANTAGES[BEST_AND_WORST])
    assert torch.equal(part.latents, batch.latents[BEST_AND_WORST])
    assert torch.equal(part.prompt_embeds, batch.prompt_embeds[BEST_AND_WORST])
    assert part.samples == [batch.samples[row] for row in BEST_AND_WORST]


def test_all_once_is_the_batch_itself():
    batch = video_batch()
    part, values = part_of(batch)
    assert part is batch and values["row"].tolist() == list(range(8))


@pytest.mark.parametrize(("fraction", "number"), [(0.01, 1), (0.2, 2), (0.3, 2), (0.9, 7)])
def test_fraction_of_a_batch(fraction, number):
    assert config(train_batch_size=8, trained_fraction=fraction).trained_videos == number


def test_each_draw_has_noise_of_its_own_and_the_first_that_of_a_single_one():
    batch = video_batch()
    part, _ = part_of(batch, trained_fraction=0.5, draws_per_video=3)
    noised, alone = noise_batch(part, SIGMAS), noise_batch(batch, SIGMAS)
    assert torch.equal(noised.noisy[:4], alone.noisy[BEST_AND_WORST])
    for place, (clean, sigma, noisy) in enumerate(zip(noised.clean, noised.sigma, noised.noisy)):
        draw, row = place // 4, BEST_AND_WORST[place % 4]
        generator = seeded_generator("train", *batch.samples[row].key, *[draw] * (draw > 0))
        level = SIGMAS[torch.randint(3, (), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        assert torch.equal(clean, batch.latents[row]) and sigma == level
        torch.testing.assert_close(noisy, (1 - level) * clean + level * noise)


def test_steps_of_the_sampler_go_with_their_video():
    noise, steps = torch.randn(8, 16, 6, 4, 4), torch.randn(2, 8, 16, 6, 4, 4)
    trajectory = Trajectory(noise, block_frames=3)
    for block in range(2):
        for step in range(2):
            latents = steps[step][:, :, 3 * block : 3 * block + 3]
            trajectory.on_step_end(None, step, torch.tensor(1000.0 - step), {"latents": latents})
    part, _ = part_of(video_batch(trajectory=trajectory), trained_fraction=0.5)
    for block in range(2):
        frames = slice(3 * block, 3 * block + 3)
        kept = [latents[BEST_AND_WORST][:, :, frames] for latents in (noise, *steps)]
        assert all(map(torch.equal, part.trajectory.latents[block], kept))
    assert len(trajectory.latents[0][0]) == 8


def test_gradient_is_the_mean_over_what_is_trained():
    """Against a video and a draw at a time, noised by hand."""
    pipe = policy_pipeline(num_layers=1)
    settings = config(train_batch_size=8, trained_fraction=0.25, draws_per_video=2)
    accelerator, batch = Accelerator(mixed_precision="no"), video_batch(pipe)
    ones = torch.ones(8)
    values = {"optimality": optimality(ADVANTAGES, 5.0), "weight": ones, "kl_weight": ones}
    part, of_part = trained_part(batch, ADVANTAGES, values, settings)

    def gradients(batches, count):
        for nft_batch in batches:
            accumulate_gradients(accelerator, pipe.transformer, nft_batch, settings, count, synchronize=True)
        parameters = policy_parameters(pipe.transformer)
        found = [parameter.grad.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return found

    singles = []
    for row in (1, 3):
        for draw in range(2):
            generator = seeded_generator("train", *batch.samples[row].key, *[draw] * (draw > 0))
            level = SIGMAS[torch.randint(3, (), generator=generator)].view(1)
            clean = batch.latents[row : row + 1]
            noisy = (1 - level) * clean + level * torch.randn(clean.shape[1:], generator=generator)
            noised = NoisedBatch(clean, noisy, level, 1000 * level, batch.prompt_embeds[row : row + 1], pipeline=pipe)
            singles.append(NFTBatch(**vars(noised), **{name: value[row : row + 1] for name, value in values.items()}))
    together = [NFTBatch(**vars(noise_batch(part, SIGMAS)), **of_part)]
    for found, expected in zip(gradients(together, 4), gradients(singles, 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_run_trains_as_many_in_every_batch(model_folder, tmp_path, monkeypatch):
    trained = []
    accumulate = NFTTrainer.accumulate_gradients

    def counted(trainer, batch, values, samples_per_step, synchronize):
        trained.append((len(batch.samples), len(batch.latents), len(values["weight"]), samples_per_step))
        return accumulate(trainer, batch, values, samples_per_step, synchronize)

    monkeypatch.setattr(NFTTrainer, "accumulate_gradients", counted)
    settings = tiny_settings(model_folder, tmp_path, batches_per_epoch=2, trained_fraction=0.5, draws_per_video=3)
    NFTTrainer(config=NFTConfig(**settings)).train()
    assert trained == [(6, 6, 6, 12)] * 4  # two batches of four videos a step, two steps
    numbers_of_run(tmp_path)


def test_a_batch_chooses_for_itself():
    """Any number of processes has the same batches."""
    batch = video_batch()
    halves = [batch.map(batch.samples[half], lambda x: x[half]) for half in (slice(4), slice(4, 8))]
    settings = config(train_batch_size=4, trained_fraction=0.5)
    for half, rows in zip(halves, ([1, 3], [5 - 4, 7 - 4])):
        advantages = ADVANTAGES[:4] if half is halves[0] else ADVANTAGES[4:]
        part, _ = trained_part(half, advantages, {}, settings)
        assert torch.equal(part.latents, half.latents[rows])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 1, "trained_fraction": 0.5}, "leaves no video out"),
        ({"train_batch_size": 3, "trained_fraction": 0.99}, "leaves no video out"),
        ({"train_batch_size": "auto", "trained_fraction": 0.5}, "give train_batch_size a number"),
        ({"trained_fraction": 0.0}, "trained_fraction"),
        ({"trained_fraction": 1.5}, "trained_fraction"),
        ({"draws_per_video": 0}, "draws_per_video"),
        ({"train_batch_size": 4, "trained_fraction": 0.5, "selective_kl": True, "rewards": {"a": 1, "b": 0}}, "to 1"),
    ],
)
def test_settings_that_train_nothing_else(settings, message):
    with pytest.raises(UserError, match=message):
        NFTConfig(**settings)


def test_blocks_of_a_pass_count_what_is_trained():
    assert NFTConfig(train_batch_size=28, trained_fraction=0.25).num_pass_blocks == 1
    assert NFTConfig(train_batch_size=4, trained_fraction=0.25).num_pass_blocks == 7
    assert NFTConfig(train_batch_size=4, trained_fraction=0.25, draws_per_video=3).num_pass_blocks == 2
    assert CMGRPOConfig(train_batch_size=2).num_pass_blocks == 3
