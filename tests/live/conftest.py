"""A model with two LoRAs, of which one acts, and a server of it: one for each file of tests."""

import pytest

from tests.live.clients import idle, serving
from tests.live.helpers import make_model, save_loras
from tests.pipelines.test_scenes import A, B
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def lora_paths(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def model(lora_paths):
    return make_model(dict(zip(lora_paths, (1.0, 0.0))))


@pytest.fixture(scope="module")
def live(model):
    with serving(model, engine={"sessions": 2}, presets=[A, B]) as live:
        yield live


@pytest.fixture(autouse=True)
def nothing_left(request):
    yield
    if "live" in request.fixturenames:
        live = request.getfixturevalue("live")
        wait_for(lambda: idle(live), 10)
