import pytest
import torch
from diffusers.optimization import SchedulerType

from astrolabe_diffusers.training.config import LR_SCHEDULERS
from astrolabe_diffusers.training.optimization import make_optimizer, set_schedule
from tests.training.helpers import config


def test_schedules_are_those_that_need_nothing_else():
    known = {name.value for name in SchedulerType}
    assert known - set(LR_SCHEDULERS) == {"piecewise_constant"} and set(LR_SCHEDULERS) < known


@pytest.mark.parametrize("name", LR_SCHEDULERS)
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
