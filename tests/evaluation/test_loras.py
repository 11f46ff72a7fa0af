import pytest
from accelerate import Accelerator

from astrolabe_diffusers.distributed.agreement import Resources
from astrolabe_diffusers.evaluation.config import LoraEvaluationConfig
from astrolabe_diffusers.evaluation.loras import load_held_out


PROMPTS = ["a red circle moves up [0.5s] | a green cross moves up", "a blue square moves up [0.5s] | a red cross"]


@pytest.mark.parametrize("switch_prompts", [None, "pairs", "scenes"])
def test_scenes_that_nobody_makes_are_told(model_folder, tmp_path, caplog, switch_prompts):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    values = {"transitions": ["roll"], "switch_prompts": switch_prompts} if switch_prompts else {}
    values |= {"model": str(model_folder), "prompts": str(tmp_path / "prompts.txt"), "rewards": ["sharpness"]}
    config = LoraEvaluationConfig(**values, seeds=1, num_frames=33)
    with Resources() as resources:
        held_out = load_held_out(config, Accelerator(cpu=True), resources)
    warned = [message for message in caplog.messages if "--switch_prompts scenes" in message]
    assert len(warned) == (switch_prompts != "scenes")
    if not switch_prompts:
        assert [sample.texts for sample in held_out.samples] == [[prompt] for prompt in PROMPTS]
    if switch_prompts == "scenes":
        assert held_out.samples[0].texts == ["a red circle moves up", "a green cross moves up"]
