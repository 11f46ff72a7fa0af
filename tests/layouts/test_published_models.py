"""Recipes of a user's own; those of the package are tested where they are used."""

import pytest
import torch

from astrolabe_diffusers.layouts.published_models import MODELS, find_published_model
from tests.layouts.original_layout import original_weights
from tests.layouts.test_wan_checkpoints import load
from tests.tiny_pipeline import tiny_transformer


OWN = """# my_model.yaml
source: me/my-model, model.pt
weights: [ema]
transformer: {num_frames_per_block: 1, local_attn_size: 7}
pipeline: {sigmas: [1.0, 0.5]}
size: 14B
"""


def test_a_file_of_one_s_own(tmp_path):
    (tmp_path / "my_model.yaml").write_text(OWN)
    recipe = find_published_model(str(tmp_path / "my_model.yaml"))
    assert recipe.weights == ("ema",) and recipe.pipeline == {"sigmas": [1.0, 0.5]} and recipe.size == "14B"
    weights = original_weights(tiny_transformer())
    checkpoint = {"generator": {name: tensor + 1 for name, tensor in weights.items()}, "ema": weights}
    loaded = load(checkpoint, recipe=str(tmp_path / "my_model.yaml"), local_attn_size=9)
    assert torch.equal(loaded.proj_out.bias, weights["head.head.bias"])
    assert (loaded.config.num_frames_per_block, loaded.config.local_attn_size) == (1, 9)


def test_the_package_s_own_are_such_files():
    for path in MODELS.glob("*.yaml"):
        assert find_published_model(str(path)) == find_published_model(path.stem)


@pytest.mark.parametrize(
    "text, message",
    [
        ("weights: [generator]", "is no recipe: it must say its source, and may say weights, transformer, pipeline"),
        ("- source: x", "is no recipe"),
        ("source: x\nweight: [ema]", r"has no weight \(did you mean weights\?\)"),
        ("source: x\nlicense: MIT", "has no license; it has source, weights, transformer, pipeline, size"),
        ("source: x\nweights: generator", "weights must be a list of names, not 'generator'"),
        ("source: x\ntransformer: [1]", r"transformer must be a mapping of names to values, not \[1\]"),
        ("source: x\nsize: 5B", "size must be one of 1.3B, 14B, not '5B'"),
        ("source: x\nsource: y", "is no valid YAML: .*source is given twice"),
        ("source: x\ntransformer: {sink: 3}", r"transformer has no `sink` \(did you mean sink_ema or sink_size\?\)"),
        ("source: x\ntransformer: {sink_size: -3}", "`sink_size` must be a whole number of at least 0"),
    ],
)
def test_what_a_user_gets_wrong(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(original_weights(tiny_transformer()), recipe=str(path))
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_published_model(str(tmp_path / "nothing.yaml"))
