"""Noise levels as users give them: by argument, in a pipeline's config, in the settings of scripts."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.generation.config import GenerationConfig
from astrolabe_diffusers.pipelines.sigmas import check_sigmas
from tests.pipelines.test_scenes import A
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import config


WRONG = {
    "timesteps": ([1000, 750, 500, 250], "if these are timesteps, divide them by 1000"),
    "rising": ([0.25, 0.5, 1.0], "must fall from at most 1 to at least 0"),
    "equal": ([1.0, 0.5, 0.5], "must fall"),
    "nan": ([1.0, math.nan], "must fall"),
    "nan first": ([math.nan, 0.5], "must fall"),
    "below zero": ([1.0, -0.5], "must fall"),
    "no noise": ([0.0], "must fall"),
    "empty": ([], r"must fall .* not \[\]"),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("sigmas", [[1.0, 0.75, 0.5, 0.25, 0.0], (1,), np.array([0.9, 0.1]), torch.tensor([1.0, 0.5])])
def test_lists_arrays_and_tensors(sigmas):
    assert check_sigmas(sigmas) == pytest.approx([float(sigma) for sigma in sigmas], abs=0)


@pytest.mark.parametrize("case", WRONG)
def test_every_way_in(pipe, case):
    sigmas, message = WRONG[case]
    for name in ("sigmas", "first_block_sigmas"):
        with pytest.raises(ValueError, match=f"`{name}` must.*{message.removeprefix('must')}"):
            CausalWanPipeline(**pipe.components, **{name: sigmas})
    for method in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=message):
            method(A, sigmas=sigmas)
    # An empty list and NaN are others' in a YAML: the model's own levels, and no number.
    if sigmas and not any(map(math.isnan, sigmas)):
        for settings in (config, partial(GenerationConfig, prompt=A)):
            with pytest.raises(UserError, match=message) as error:
                settings(sigmas=sigmas)
            assert "\n" not in str(error.value)


def test_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="divide them by 1000"):
        DiffusionPipeline.from_pretrained(tmp_path, sigmas=[1000, 500])


def test_a_config_that_was_edited():
    pipe = tiny_pipeline()
    pipe.register_to_config(sigmas=[1000, 500])
    with pytest.raises(ValueError, match="divide them by 1000"):
        pipe.stream(A)


@pytest.mark.parametrize("sigmas", [0.5, "1,0.5", [None], [[1.0], [0.5]]])
def test_no_numbers(pipe, sigmas):
    with pytest.raises(ValueError, match="must be a list of numbers"):
        pipe(A, sigmas=sigmas)
