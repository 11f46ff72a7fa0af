import numpy as np
import pytest
import torch

from astrolabe_diffusers.training.forward_process.noising import add_noise, predicted_clean, squared_distance
from astrolabe_diffusers.training.nft.loss import nft_loss, optimality


def clips(number, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, 2, 2, generator=generator, dtype=dtype) for _ in range(number)]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_loss_is_the_formula(beta):
    current, old, clean = clips(3)
    r = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    losses = nft_loss(current, old, clean, r, beta)
    for i in range(3):
        c, o, x = (t[i].numpy() for t in (current, old, clean))
        plus = np.mean(((1 - beta) * o + beta * c - x) ** 2)
        minus = np.mean(((1 + beta) * o - beta * c - x) ** 2)
        np.testing.assert_allclose(losses[i].item(), r[i].item() * plus + (1 - r[i].item()) * minus, rtol=1e-12)


def test_adaptive_loss_is_diffusionnft_s():
    """`A_max (r / b |x+ - x0|^2 / w+ + (1 - r) / b |x- - x0|^2 / w-)`, `w` the mean absolute error, a constant."""
    current, old, clean = clips(3)
    clean[2] = old[2] + 1e-9  # distance below the floor of 1e-5
    r, beta, adv_max = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), 0.1, 5.0
    current[2] = old[2]
    current.requires_grad_()
    losses = nft_loss(current, old, clean, r, beta, adaptive=adv_max)
    losses.sum().backward()
    for i in range(3):
        c, o, x = (t[i].detach().numpy() for t in (current, old, clean))
        plus, minus = (1 - beta) * o + beta * c - x, (1 + beta) * o - beta * c - x
        weights = [max(np.abs(error).mean(), 1e-5) for error in (plus, minus)]
        parts = [np.mean(error**2 / weight) for error, weight in zip((plus, minus), weights)]
        ri = r[i].item()
        expected = adv_max * (ri / beta * parts[0] + (1 - ri) / beta * parts[1])
        np.testing.assert_allclose(losses[i].item(), expected, rtol=1e-10)
        gradient = adv_max * 2 / c.size * (ri * plus / weights[0] - (1 - ri) * minus / weights[1])
        np.testing.assert_allclose(current.grad[i].numpy(), gradient, rtol=1e-9, atol=1e-15)


def test_gradient_of_nft_loss_by_finite_differences():
    current, old, clean = clips(3)
    r = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    current.requires_grad_()
    nft_loss(current, old, clean, r, 0.6).sum().backward()
    direction = clips(1, seed=5)[0]
    step = 1e-5
    with torch.no_grad():
        up = nft_loss(current + step * direction, old, clean, r, 0.6).sum()
        down = nft_loss(current - step * direction, old, clean, r, 0.6).sum()
    torch.testing.assert_close((current.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-8, atol=0)


def test_good_samples_attract_bad_ones_repel_and_average_ones_do_nothing():
    old, clean = clips(2)
    current = old.clone().requires_grad_()
    nft_loss(current, old, clean, torch.tensor([1.0, 0.5, 0.0]), beta=0.5).sum().backward()
    towards = clean - old
    assert (-current.grad[0] * towards[0]).sum() > 0
    torch.testing.assert_close(current.grad[1], torch.zeros_like(current.grad[1]))
    torch.testing.assert_close(current.grad[2], -current.grad[0] * towards[2] / towards[0])


def test_optimality_clips_and_maps_to_the_unit_interval():
    advantages = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 70.0])
    torch.testing.assert_close(optimality(advantages, 5.0), torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0]))


def test_true_flow_gives_back_the_clean_sample():
    clean, noise = clips(2)
    sigma = torch.tensor([1.0, 0.9375, 0.1], dtype=torch.float64)
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(predicted_clean(noisy, noise - clean, sigma), clean)


def test_squared_distance_averages_all_but_the_batch():
    a, b = clips(2)
    expected = ((a - b).numpy() ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(squared_distance(a, b).numpy(), expected)
