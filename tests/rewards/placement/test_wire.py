import json
import math

import pytest
import torch
from safetensors.torch import save

from astrolabe_diffusers.rewards import FrameRequest, RewardOutput
from astrolabe_diffusers.rewards.placement.wire import (
    VERSION,
    ScoringJob,
    outputs_from_json,
    outputs_to_json,
    pack_job,
    requests_from_json,
    requests_to_json,
    unpack_job,
)


PROMPTS = ["a cat", "ein Kätzchen <|im_end|>"]


def make_job():
    ends = FrameRequest((0, 4))
    requests = {"whole": None, "first": ends, "second": ends}
    return ScoringJob.make(torch.rand(2, 5, 3, 4, 6), requests, PROMPTS, [{"a": 1}, {}])


def test_a_job_arrives_as_it_was():
    job = make_job()
    back = unpack_job(pack_job(job))
    assert (back.prompts, back.metadata, back.whole) == (PROMPTS, [{"a": 1}, {}], {"whole"})
    assert all(torch.equal(back.frames[name], tensor) for name, tensor in job.frames.items())
    assert back.frames["whole"].shape == (2, 5, 3, 4, 6) and back.frames["first"].shape == (2, 2, 3, 4, 6)


def test_shared_frames_travel_once_and_stay_shared():
    job = make_job()
    assert len(pack_job(job)) < 2 * (5 + 2) * 3 * 4 * 6 + 600
    for same in (job, unpack_job(pack_job(job)), ScoringJob.join([job, job])):
        assert same.frames["first"] is same.frames["second"]


def test_joined_jobs_keep_what_belongs_together():
    one, other, bare, barer = (
        ScoringJob.make(torch.rand(1, 5, 3, 4, 6), {"whole": None}, [prompt], metadata)
        for prompt, metadata in (("one", [{"a": 1}]), ("other", [{}]), ("bare", None), ("barer", None))
    )
    joined = ScoringJob.join([one, other])
    assert joined.prompts == ["one", "other"] and joined.metadata == [{"a": 1}, {}] and joined.whole == {"whole"}
    assert torch.equal(joined.frames["whole"], torch.cat([one.frames["whole"], other.frames["whole"]]))
    # A reward may make something else of none than of an empty one.
    assert one.kind() == other.kind() != bare.kind() == barer.kind()
    assert ScoringJob.join([bare, barer]).metadata is None


def header(**values):
    text = {"version": VERSION, "rewards": {"r": "0"}, "whole": [], "prompts": ["p"], "metadata": None, **values}
    return torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)


VIDEO = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no job"),
        (b"GET / HTTP/1.1\r\n\r\n", "no job"),
        (pack_job(make_job())[:-10], "no job"),
        (save({"0": VIDEO}), "no job"),
        (save({"0": VIDEO, "header": torch.zeros(4, dtype=torch.uint8)}), "no job"),
        (save({"0": VIDEO, "header": header(rewards={"r": "1"})}), "no job"),
        (save({"0": VIDEO, "header": header(rewards={})}), "must name rewards"),
        (save({"0": VIDEO, "header": header(prompts=["p", "q"])}), "one video a prompt"),
        (save({"0": VIDEO, "header": header(prompts=[1])}), "list of prompts"),
        (save({"0": VIDEO, "header": header(metadata=[{}, {}])}), "metadata"),
        (save({"0": VIDEO.float(), "header": header()}), "uint8"),
        (save({"0": VIDEO[0], "header": header()}), "uint8"),
        (save({"0": VIDEO[:, :0], "header": header()}), "none of them empty"),
        (save({"0": VIDEO[:, :, :2].contiguous(), "header": header()}), "uint8"),
        (save({"0": VIDEO[:, :, :1].contiguous(), "header": header(whole=["r"])}), "uint8"),
        (save({"0": VIDEO, "header": header(version=1)}), "of version 1, not 3"),
        (save({"header": torch.tensor([91] * 100_000, dtype=torch.uint8)}), "no job for rewards: .*nested too deeply"),
    ],
)
def test_anything_else_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        unpack_job(data)


def test_requests_and_scores_survive_json():
    requests = {"a": None, "b": FrameRequest((0, 3), ((4, 6), (2, 6))), "c": FrameRequest((1,), gray=True)}
    assert requests_from_json(json.loads(json.dumps(requests_to_json(requests)))) == requests
    # The third has no short decimal: it must come back exactly.
    scores = torch.tensor([math.nan, -math.inf, 0.1 + 1e-8])
    outputs = {"a": RewardOutput(scores, {"part": torch.tensor([1.0, 2.0, 3.0])})}
    text = json.dumps(outputs_to_json(outputs), allow_nan=False)
    back = outputs_from_json(json.loads(text), ["a"], 3)["a"]
    torch.testing.assert_close(back.scores, scores, equal_nan=True, rtol=0, atol=0)
    assert back.info["part"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"a": {"scores": [1.0, 2.0], "info": {}}, "b": {"scores": [1.0, 2.0], "info": {}}},
        {"a": {"scores": [1.0], "info": {}}},
        {"a": {"scores": [1.0, 2.0, 3.0], "info": {}}},
        {"a": {"scores": [1.0, 2.0], "info": {"part": [1.0]}}},
        {"a": {"scores": [1.0, None], "info": {}}},
        {"a": {"scores": 1.0, "info": {}}},
        {"a": {"info": {}}},
    ],
)
def test_nonsense_is_no_score(answer):
    with pytest.raises(ValueError):
        outputs_from_json(answer, ["a"], 2)
