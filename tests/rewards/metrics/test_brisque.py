import importlib.util
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rewards.metrics.brisque import SupportVectorRegression, brisque_features


def slow_normalized(image):
    """Pixel by pixel: minus the local mean, over the local deviation and 1/255."""
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * (7 / 6) ** 2)) for i in range(-3, 4)] for j in range(-3, 4)])
    weights /= weights.sum()
    padded = np.pad(image, 3)
    result = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            window = padded[y : y + 7, x : x + 7]
            mean = (weights * window).sum()
            deviation = math.sqrt(abs((weights * window**2).sum() - mean**2))
            result[y, x] = (image[y, x] - mean) / (deviation + 1 / 255)
    return result


def slow_fit(values):
    """Shape by search over a fine grid, as in the paper; left and right deviations from both sides of zero."""
    left = math.sqrt(np.mean(values[values < 0] ** 2))
    right = math.sqrt(np.mean(values[values >= 0] ** 2))
    g = left / right
    wanted = np.mean(np.abs(values)) ** 2 / np.mean(values**2) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    grid = np.arange(0.2, 10, 0.0005)
    ratio = [math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in grid]
    a = grid[np.argmin(np.abs(np.array(ratio) - wanted))]
    mean = (right - left) * math.sqrt(math.gamma(1 / a) / math.gamma(3 / a)) * math.gamma(2 / a) / math.gamma(1 / a)
    return a, mean, left**2, right**2


def picture(size=32):
    y, x = np.mgrid[:size, :size]
    noise = np.random.default_rng(0).normal(0, 0.02, (size, size))
    return np.clip(0.5 + 0.3 * np.sin(x / 3) * np.cos(y / 5) + noise, 0, 1)


def test_features_are_those_of_the_paper():
    image = picture()
    features = brisque_features(torch.from_numpy(image)[None])[0].numpy()
    x = slow_normalized(image)
    shape, _, left, right = slow_fit(x.ravel())
    expected = [shape, (left + right) / 2]
    for product in (x[:, :-1] * x[:, 1:], x[:-1] * x[1:], x[:-1, :-1] * x[1:, 1:], x[1:, :-1] * x[:-1, 1:]):
        expected += slow_fit(product.ravel())
    assert features.shape == (36,)
    np.testing.assert_allclose(features[:18], expected, rtol=2e-3, atol=1e-4)


def test_shape_of_known_distributions():
    """1 is a Laplace, 2 a normal distribution: the products of white noise are neither, but the fit itself is."""
    from astrolabe_diffusers.rewards.metrics.brisque import _fit

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 400_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(1, 400_000, generator=generator, dtype=torch.float64)
    laplace = normal.sign() * -uniform.log()
    assert _fit(normal)[0].item() == pytest.approx(2, rel=0.02)
    assert _fit(laplace)[0].item() == pytest.approx(1, rel=0.02)
    assert _fit(3 * normal)[2].item() == pytest.approx(9, rel=0.02)


def test_regression_reads_the_files_of_libsvm(tmp_path):
    (tmp_path / "svm.txt").write_text(
        "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\ntotal_sv 2\nrho -10\nSV\n"
        "3 1:0.5 2:-1\n-2 2:1 \n"
    )
    (tmp_path / "ranges.pickle").write_bytes(pickle.dumps({"min_": [0.0, 10.0], "max_": [2.0, 20.0]}))
    model = SupportVectorRegression(tmp_path / "svm.txt", tmp_path / "ranges.pickle")
    # [2, 15] is [1, 0] in the range: squared distances 0.25 + 1 and 1 + 1.
    expected = 3 * math.exp(-0.5 * 1.25) - 2 * math.exp(-0.5 * 2) + 10
    assert model(torch.tensor([[2.0, 15.0]])).item() == pytest.approx(expected)


class Evil:
    def __reduce__(self):
        return exec, ("open('mark', 'w').close()",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"min_": [0.0], "max_": Evil()}, protocol=0),
        pickle.dumps({"min_": [0.0]}),
        pickle.dumps({"min_": 3, "max_": [1.0]}),
        pickle.dumps({"min_": [0.0], "max_": ["high"]}),
        pickle.dumps([1, 2]),
        b"no pickle",
        b"",
    ],
)
def test_no_code_of_the_package_s_data_is_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "svm.txt").write_text("gamma 0.5\nrho -10\nSV\n3 1:0.5\n")
    (tmp_path / "ranges.pickle").write_bytes(content)
    with pytest.raises(ValueError, match="ranges.pickle is no pickle of min_ and max_") as error:
        SupportVectorRegression(tmp_path / "svm.txt", tmp_path / "ranges.pickle")
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps brisque"):
        get_reward("brisque")


@pytest.fixture
def brisque():
    if importlib.util.find_spec("brisque") is None:
        pytest.skip("its weights are not here: pip install --no-deps brisque")
    return get_reward("brisque")


def photograph():
    """[3, 128, 160] with the statistics of a photograph: a spectrum that falls with the frequency, and edges."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.fft.fftfreq(128), torch.fft.fftfreq(160), indexing="ij")
    frequency = (x.square() + y.square()).sqrt().clamp(min=1 / 160)
    clouds = torch.fft.ifft2(torch.fft.fft2(torch.randn(3, 128, 160, generator=generator)) / frequency).real
    clouds = clouds / clouds.std() * 0.12 + 0.5
    clouds[:, 40:90, 50:110] += 0.25
    return clouds.clamp(0, 1)


def test_distortion_costs(brisque):
    clean = photograph()
    blurred = torch.nn.functional.avg_pool2d(clean, 7, 1, 3)
    noisy = (clean + 0.15 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    videos = torch.stack([clean, blurred, noisy, torch.full_like(clean, 0.5)])[:, None].expand(-1, 2, -1, -1, -1)
    scores = brisque.score(videos, [""] * 4).scores
    assert scores[0] > scores[1:].max() + 0.1
    torch.testing.assert_close(scores, torch.cat([brisque.score(video[None], [""]).scores for video in videos]))


def test_a_video_is_the_mean_of_its_frames(brisque):
    clean = photograph()
    videos = torch.stack([clean, clean.flip(1), 1 - clean])[None]
    singles = [brisque.score(videos[:, i : i + 1], [""]).scores for i in range(3)]
    torch.testing.assert_close(brisque.score(videos, [""]).scores, sum(singles) / 3)
    ends = get_reward("brisque", frames="stride:2").score(videos, [""]).scores
    torch.testing.assert_close(ends, (singles[0] + singles[2]) / 2)


def test_scores_are_those_of_the_package(brisque):
    """Against its own code, with SciPy, OpenCV and libsvm, where they are installed."""
    for module in ("cv2", "skimage", "libsvm"):
        pytest.importorskip(module, reason="needs what the package brisque needs: pip install brisque")
    import scipy.ndimage

    # It is written for an older SciPy and NumPy.
    sys.modules.setdefault("scipy.ndimage.filters", scipy.ndimage)
    from brisque import BRISQUE

    reference = BRISQUE(url=False)
    scale = reference.scale_features
    reference.scale_features = lambda features: scale([float(np.ravel(f)[0]) for f in features])
    for frame in (photograph(), torch.rand(3, 64, 96)):
        pixels = (frame * 255).round()
        expected = reference.score(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
        score = brisque.score((pixels / 255)[None, None], [""]).scores.item()
        assert 100 * (1 - score) == pytest.approx(expected, abs=0.01)
