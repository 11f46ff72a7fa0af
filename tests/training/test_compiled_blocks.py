"""Training with compiled blocks: the same adapter, and nothing compiled after the first epoch."""

import pytest
import torch
from safetensors.torch import load_file

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from tests.tiny_pipeline import SMALL, tiny_pipeline


PROMPTS = ["a red circle", "a blue square", "a green cross", "a yellow circle"]


def run(folder, **settings):
    """Two steps an epoch, three blocks."""
    config = NFTConfig(
        output_dir=str(folder),
        rewards={"sharpness": 1.0},
        num_frames=33,
        train_batch_size=2,
        batches_per_epoch=2,
        gradient_accumulation_steps=1,
        samples_per_prompt=2,
        rank=2,
        lora_alpha=2,
        learning_rate=1e-2,
        max_train_steps=6,
        num_eval_prompts=1,
        eval_seeds=1,
        num_eval_videos=0,
        report_to="none",
        **settings,
    )
    NFTTrainer(tiny_pipeline(**SMALL), config, train_prompts=PROMPTS).train()
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": "selective", "blocks_per_pass": 1}])
def test_nothing_is_compiled_after_the_first_epoch(settings, tmp_path, monkeypatch):
    expected = run(tmp_path / "eager", **settings)
    graphs, epochs = [], []

    def backend(graph, inputs):
        graphs.append(len(epochs))
        return graph

    compile_blocks = CausalWanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(
        CausalWanTransformer3DModel,
        "compile_repeated_blocks",
        lambda self, **kwargs: compile_blocks(self, backend=backend, **kwargs),
    )
    train = NFTTrainer.after_epoch
    monkeypatch.setattr(NFTTrainer, "after_epoch", lambda self, *args: (epochs.append(1), train(self, *args)))
    torch._dynamo.reset()
    result = run(tmp_path / "compiled", compile=True, **settings)
    torch._dynamo.reset()
    assert len(epochs) == 3 and graphs and set(graphs) == {0}
    assert all(torch.allclose(result[name], tensor, atol=1e-5) for name, tensor in expected.items())


@pytest.mark.parametrize("settings", [{"blocks_per_pass": 2}, {"window_size": 3, "sample_frames": 9}])
def test_passes_that_would_each_be_compiled(settings, tmp_path):
    with pytest.raises(UserError, match="compile needs blocks_per_pass=1"):
        run(tmp_path, compile=True, **settings)
