import pytest
import torch

from astrolabe_diffusers.training.optimization import make_optimizer, set_schedule
from astrolabe_diffusers.training.states import (
    check_form,
    check_optimizer_tensors,
    load_optimizer,
    optimizer_tensors,
)
from tests.training.helpers import config


def steps(parameters, optimizer, number, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameters["idle"].grad = None
        optimizer.step()


def parameters_and_optimizer(**settings):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (5,), "idle": (2,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return parameters, torch.optim.AdamW(parameters.values(), **settings)


def test_an_optimizer_goes_on_as_if_nothing_had_been():
    """Against one that is never stopped, and the state that torch itself would keep."""
    parameters, optimizer = parameters_and_optimizer(lr=0.1)
    steps(parameters, optimizer, 3, seed=1)
    tensors = {name: value.clone() for name, value in optimizer_tensors(parameters, optimizer).items()}
    assert set(tensors) == {f"{name}.{moment}" for name in "ab" for moment in ("step", "exp_avg", "exp_avg_sq")}
    again, other = parameters_and_optimizer(lr=0.1)
    for name, parameter in again.items():
        parameter.data.copy_(parameters[name].data)
    check_optimizer_tensors(tensors, again)
    load_optimizer(tensors, again, other)
    expected = optimizer.state_dict()["state"]
    assert other.state_dict()["state"].keys() == expected.keys()
    for index, state in expected.items():
        assert all(torch.equal(value, other.state_dict()["state"][index][name]) for name, value in state.items())
    steps(parameters, optimizer, 2, seed=2)
    steps(again, other, 2, seed=2)
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)
    # A state without moments is that of before the first step.
    load_optimizer({}, again, other)
    assert not other.state_dict()["state"]


def test_settings_of_a_run_go_before_those_of_its_checkpoint():
    parameters, optimizer = parameters_and_optimizer(lr=0.1)
    steps(parameters, optimizer, 1, seed=1)
    again, other = parameters_and_optimizer(lr=0.02, weight_decay=0.3, betas=(0.5, 0.6))
    load_optimizer(optimizer_tensors(parameters, optimizer), again, other)
    (group,) = other.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.3, (0.5, 0.6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.exp_avg": torch.zeros(2, 3)}, r"1 of another shape \(a.exp_avg \(2, 3\) for \(3, 2\)\)"),
        ({"b.exp_avg": torch.zeros(5, dtype=torch.int32)}, "b.exp_avg is torch.int32, not float32"),
        ({"a.step": torch.ones(1)}, r"a.step \(1,\) for \(\)"),
        ({"a.step": None}, r"1 missing \(a.step\)"),
        ({"c.step": torch.ones(())}, r"1 unexpected \(c.step\)"),
    ],
)
def test_moments_that_do_not_fit(change, message):
    parameters, optimizer = parameters_and_optimizer()
    steps(parameters, optimizer, 1, seed=1)
    tensors = optimizer_tensors(parameters, optimizer) | change
    with pytest.raises(ValueError, match=message):
        check_optimizer_tensors({name: value for name, value in tensors.items() if value is not None}, parameters)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_a_schedule_is_where_it_would_have_come_to(name):
    settings = config(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=16, learning_rate=1e-3)
    stepped, schedule = make_optimizer(settings, [torch.nn.Parameter(torch.ones(1))])
    optimizer, resumed = make_optimizer(settings, [torch.nn.Parameter(torch.ones(1))])
    stepped.step()
    for _ in range(6):
        schedule.step()
    set_schedule(optimizer, resumed, 6)
    optimizer.step()
    for _ in range(3):
        assert optimizer.param_groups[0]["lr"] == stepped.param_groups[0]["lr"] == resumed.get_last_lr()[0]
        schedule.step()
        resumed.step()


LIKE = {"step": 3, "seconds": 1.5, "guard": {"norm": None}, "buffer": []}


def test_a_state_of_the_right_form():
    check_form(LIKE, LIKE)
    check_form({"step": 0, "seconds": 2, "guard": {"norm": 0.5}, "buffer": [1, 0.5]}, LIKE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "step must be a whole number from 0, not '3'"),
        ({"step": -1}, "step must be"),
        ({"step": True}, "step must be"),
        ({"step": 1.0}, "step must be"),
        ({"seconds": "long"}, "seconds must be a number"),
        ({"seconds": float("nan")}, "seconds must be a number"),
        ({"guard": []}, r"guard must have norm, not \[\]"),
        ({"guard": {"norm": [1]}}, r"guard.norm must be a number, not \[1\]"),
        ({"buffer": {"a": 1}}, "buffer must be a list of numbers"),
        ({"buffer": ["1"]}, "buffer must be a list of numbers"),
        ({"more": 1}, "it must have step, seconds, guard, buffer"),
    ],
)
def test_a_state_of_another_form(change, message):
    with pytest.raises(ValueError, match=message):
        check_form(LIKE | change, LIKE)
