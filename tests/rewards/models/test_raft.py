"""RAFT's dynamic degree, where torchvision is installed, against torchvision's own preprocessing and VBench's sums."""

import sys

import numpy as np
import pytest
import torch

from astrolabe_diffusers.rewards.models.raft import RaftDynamicDegree, torchvision_names
from tests.rewards.drawn_patterns import patterns


def published_names():
    """Names in princeton-vl/RAFT's file, module by module, and in torchvision's."""
    convs, norms = {}, {}
    for theirs, ours in (("fnet", "feature_encoder"), ("cnet", "context_encoder")):
        convs |= {f"{theirs}.conv1": f"{ours}.convnormrelu.0", f"{theirs}.conv2": f"{ours}.conv"}
        norms[f"{theirs}.norm1"] = f"{ours}.convnormrelu.1"
        for layer in ("layer1", "layer2", "layer3"):
            for i in (0, 1):
                block = f"{layer}.{i}"
                for k in (1, 2):
                    convs[f"{theirs}.{block}.conv{k}"] = f"{ours}.{block}.convnormrelu{k}.0"
                    norms[f"{theirs}.{block}.norm{k}"] = f"{ours}.{block}.convnormrelu{k}.1"
            if layer != "layer1":
                convs[f"{theirs}.{layer}.0.downsample.0"] = f"{ours}.{layer}.0.downsample.0"
                norms[f"{theirs}.{layer}.0.downsample.1"] = f"{ours}.{layer}.0.downsample.1"
    for theirs, ours in (("convc", "convcorr"), ("convf", "convflow")):
        convs |= {f"update_block.encoder.{theirs}{k}": f"update_block.motion_encoder.{ours}{k}.0" for k in (1, 2)}
    convs["update_block.encoder.conv"] = "update_block.motion_encoder.conv.0"
    for gate in "zrq":
        for k in (1, 2):
            convs[f"update_block.gru.conv{gate}{k}"] = f"update_block.recurrent_block.convgru{k}.conv{gate}"
    convs |= {f"update_block.flow_head.conv{k}": f"update_block.flow_head.conv{k}" for k in (1, 2)}
    convs |= {"update_block.mask.0": "mask_predictor.convrelu.0", "update_block.mask.2": "mask_predictor.conv"}
    names = {f"{a}.{end}": f"{b}.{end}" for a, b in convs.items() for end in ("weight", "bias")}
    # The features' norm has no parameters.
    ends = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names |= {f"{a}.{end}": f"{b}.{end}" for a, b in norms.items() if a.startswith("cnet") for end in ends}
    return {f"module.{theirs}": ours for theirs, ours in names.items()}


def test_published_names():
    names = published_names()
    tensors = {theirs: torch.tensor(i) for i, theirs in enumerate(names)}
    # As the file has it, twice.
    twice = {f"module.cnet.layer2.0.norm3.{end}": torch.tensor(-1) for end in ("weight", "running_var")}
    named = torchvision_names(tensors | twice)
    assert named == {ours: tensors[theirs] for theirs, ours in names.items()}
    assert torchvision_names(named) == named


def test_without_torchvision_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ImportError, match=r"raft_dynamic_degree needs torchvision: pip install 'astrolabe_diff"):
        RaftDynamicDegree("nowhere")


def test_float32_alone():
    with pytest.raises(ValueError, match="float32 alone"):
        RaftDynamicDegree("nowhere", dtype="bfloat16")


@pytest.fixture(scope="module")
def optical_flow():
    return pytest.importorskip(
        "torchvision.models.optical_flow", reason="needs the extra `rewards`", exc_type=(ImportError, RuntimeError)
    )


@pytest.fixture(scope="module")
def published(optical_flow, tmp_path_factory):
    """A folder with the published file, of random numbers, and the model."""
    model, generator = optical_flow.raft_large(), torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    weights = model.state_dict()
    assert set(published_names().values()) == weights.keys()
    folder = tmp_path_factory.mktemp("raft")
    torch.save({theirs: weights[ours] for theirs, ours in published_names().items()}, folder / "raft-things.pth")
    return folder, model.eval()


@pytest.fixture(scope="module")
def reward(published):
    return RaftDynamicDegree(str(published[0]), device="cpu")


def test_against_torchvision_and_numpy(optical_flow, published, reward):
    """Eight frames a second of 16, and sizes that are no multiples of 8."""
    videos = patterns(frames=5, height=133, width=139)
    preprocess, speeds = optical_flow.Raft_Large_Weights.C_T_V1.transforms(), []

    @torch.no_grad()
    def flow(*pair):
        return published[1](*preprocess(*(frame[None] for frame in pair)), num_flow_updates=20)[-1]

    for video in videos:
        frames = (video.numpy() * 255).round().astype(np.uint8)[::2]
        padded = torch.from_numpy(np.pad(frames, ((0, 0), (0, 0), (1, 2), (2, 3)), mode="edge"))
        flows = [flow(*pair)[0].double().numpy() for pair in zip(padded, padded[1:])]
        magnitudes = [np.sqrt(x**2 + y**2).flatten() for x, y in flows]
        speeds.append([np.sort(m)[::-1][: int(136 * 144 * 0.05)].mean() for m in magnitudes])
    output = reward.score(videos, ["", ""])
    expected = torch.tensor(np.mean(speeds, axis=1))
    torch.testing.assert_close(output.scores.double(), expected, rtol=1e-4, atol=0)
    assert (expected[0] - expected[1]).abs() > 0.01 * expected[0]
    shares = (np.array(speeds) > 6 * 133 / 256).mean(1).tolist()
    assert output.info["above_threshold"].tolist() == shares
    assert reward.score(videos[:1, :2], [""]).scores.tolist() == [0.0]  # one frame of them


def test_the_file_in_torchvision_s_names(published, reward, tmp_path):
    torch.save(published[1].state_dict(), tmp_path / "weights.pth")
    weights = RaftDynamicDegree(str(tmp_path / "weights.pth"), device="cpu").model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in reward.model.state_dict().items())


def test_what_is_missing_or_does_not_fit(published, reward, tmp_path):
    with pytest.raises(ValueError, match="needs a checkpoint, the file raft-things.pth or raft_large_C_T_V1"):
        RaftDynamicDegree()
    torch.save({"module.fnet.conv1.weight": torch.zeros(32, 3, 7, 7)}, tmp_path / "raft-small.pth")
    with pytest.raises(ValueError, match=r"no RAFT as raft-things.pth .*missing.*\(32, 3, 7, 7\) for \(64, 3, 7, 7\)"):
        RaftDynamicDegree(str(tmp_path / "raft-small.pth"))
    with pytest.raises(ValueError, match="at least 128 x 128 pixels, not 120 x 160"):
        reward.score(torch.zeros(1, 3, 3, 120, 160), [""])
