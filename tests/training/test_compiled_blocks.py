"""Training with compiled blocks: when they are, the same adapter, and nothing compiled after the first epoch."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training import NFTConfig, NFTTrainer, batch_size
from astrolabe_diffusers.training.forward_process import compilation
from astrolabe_diffusers.training.forward_process import trainer as blockwise
from tests.tiny_pipeline import SMALL, tiny_pipeline
from tests.training.helpers import numbers_of_run
from tests.training.memory import limit_batches
from tests.two_experts import two_expert_pipeline


PROMPTS = ["a red circle", "a blue square", "a green cross", "a yellow circle"]


def make_trainer(folder, pipe=None, **settings):
    """Two steps an epoch, three blocks."""
    values = dict(
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
    )
    return NFTTrainer(pipe or tiny_pipeline(**SMALL), NFTConfig(**values | settings), train_prompts=PROMPTS)


def run(folder, *args, **settings):
    make_trainer(folder, *args, **settings).train()
    return load_file(folder / "pytorch_lora_weights.safetensors")


def on_cuda(monkeypatch):
    """Runs decide as on a GPU with a compiler whether blocks are compiled."""
    decide = compilation.compiles_blocks
    monkeypatch.setattr(blockwise, "compiles_blocks", lambda *args: decide(*args[:-1], torch.device("cuda")))
    monkeypatch.setattr(compilation, "compiler_works", lambda device: True)


@pytest.fixture
def as_on_cuda(monkeypatch):
    on_cuda(monkeypatch)


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced, and run as it is: for each graph how many epochs were over, and a list as long as
    there are epochs."""
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
    yield graphs, epochs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "make_pipeline"),
    [
        ({"train_batch_size": 1, "batches_per_epoch": 4, "gradient_accumulation_steps": 2}, tiny_pipeline),
        ({"compile": True, "gradient_checkpointing": "selective", "blocks_per_pass": 1}, tiny_pipeline),
        ({"gradient_checkpointing": "selective", "kl_weight": 0, "context_policy": "own"}, tiny_pipeline),
        ({"context": "noisy", "gradient_checkpointing": "full", "ema_decay": 0.5}, tiny_pipeline),
        ({"context": "clean_grad", "gradient_checkpointing": "full"}, tiny_pipeline),
        ({}, two_expert_pipeline),
        ({"context": "clean_grad", "lora_expert": "both"}, two_expert_pipeline),
    ],
)
def test_nothing_is_compiled_after_the_first_epoch(settings, make_pipeline, tmp_path, as_on_cuda, traced):
    graphs, epochs = traced
    expected = run(tmp_path / "eager", make_pipeline(**SMALL), **settings | {"compile": False})
    assert not graphs
    epochs.clear()
    result = run(tmp_path / "compiled", make_pipeline(**SMALL), **settings)
    print(len(graphs), "graphs")
    assert len(epochs) == 3 and graphs and set(graphs) == {0}
    assert all(torch.allclose(result[name], tensor, atol=1e-5) for name, tensor in expected.items())


@pytest.mark.parametrize("settings", [{"blocks_per_pass": 2}, {"window_size": 3, "sample_frames": 9}])
def test_passes_that_would_each_be_compiled(settings, tmp_path):
    with pytest.raises(UserError, match="compile needs blocks_per_pass=1"):
        make_trainer(tmp_path, compile=True, **settings)


@pytest.fixture
def uncompiled(monkeypatch):
    """The calls that would compile blocks."""
    calls = []
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "compile_repeated_blocks", lambda _, **kwargs: calls.append(kwargs)
    )
    return calls


def test_a_resumed_run_decides_anew(tmp_path, monkeypatch, uncompiled, no_charts, capsys):
    """By machine and settings, which the checkpoint does not overrule: on the same the choice is the same."""
    values = dict(num_frames=9, max_train_steps=2, checkpointing_steps=2, eval_steps=100)

    def goes_on(**settings):
        """In one epoch more; whether blocks are compiled."""
        uncompiled.clear()
        values["max_train_steps"] += 2
        run(tmp_path / "run", resume_from_checkpoint="latest", **values | settings)
        out = capsys.readouterr().out
        assert f"resuming from {tmp_path / 'run'}" in out
        assert ("parameters; blocks are compiled, " if uncompiled else "parameters; blocks are not compiled") in out
        return bool(uncompiled)

    with monkeypatch.context() as patch:
        on_cuda(patch)
        run(tmp_path / "run", **values)
        assert len(uncompiled) == 1
        newest = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "config.yaml"
        assert yaml.safe_load(newest.read_text())["compile"] is None
        assert goes_on()
        assert not goes_on(compile=False)
        assert goes_on()
    assert not goes_on()  # on a CPU
    assert goes_on(compile=True)
    run(tmp_path / "whole", **values)
    numbers = [numbers_of_run(tmp_path / name) for name in ("run", "whole")]
    assert numbers[0]["state"] == numbers[1]["state"]
    assert numbers[0]["pytorch_lora_weights.safetensors"] == numbers[1]["pytorch_lora_weights.safetensors"]


def test_batches_are_tried_uncompiled(tmp_path, monkeypatch, as_on_cuda, traced):
    monkeypatch.setattr(batch_size, "says_when_memory_is_full", lambda device: True)
    settings = dict(train_batch_size="auto", batches_per_epoch=4, gradient_accumulation_steps=4, max_train_steps=1)
    trainer = make_trainer(tmp_path, num_frames=9, **settings)
    tried = limit_batches(trainer.transformer, 2)
    trainer.start()
    trainer.end()
    assert trainer.compiled and trainer.config.train_batch_size == 2 and tried >= {1, 2, 4}
    assert not traced[0]
