"""`pytest --compile BACKEND`: in every test the blocks of every transformer run compiled, each as one graph, which is
counted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from astrolabe_diffusers.models.module_calls import has_hooks, is_hooked
from astrolabe_diffusers.models.transformer_causal_wan import CausalWanTransformerBlock


class CountingBackend:
    """A backend of torch.compile that counts graphs and their calls. One for all tests: they share graphs, as the
    models of a process do."""

    def __init__(self, name: str):
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = self.calls = 0
        # pytest would keep a record of every tensor of every graph.
        logging.getLogger("torch.__trace").propagate = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        compiled = self.compile(graph, inputs)
        self.graphs += 1

        def call(*args):
            self.calls += 1
            return compiled(*args)

        return call


@contextmanager
def compiled_blocks(backend: CountingBackend) -> Iterator[None]:
    """Inside, a call of a block is one call of a graph, or an `AssertionError`."""

    def call(block, *args, **kwargs):
        if is_hooked(block) or has_hooks(block):  # layers that are offloaded one by one cannot be compiled
            return torch.nn.Module.__call__(block, *args, **kwargs)
        # Here and not where a model is made: a copy of one is not compiled.
        if block._compiled_call_impl is None:
            block.compile(fullgraph=True, backend=backend)
        before = backend.calls
        output = torch.nn.Module.__call__(block, *args, **kwargs)
        assert backend.calls == before + 1, f"{backend.calls - before} graphs ran in a block"
        return output

    config = {
        # All the models of a process, where `compile_repeated_blocks` allows for one.
        "recompile_limit": 10_000,
        "accumulated_recompile_limit": 10_000,
        # Some tests look into blocks with hooks, which are not in a graph that was made without.
        "skip_nnmodule_hook_guards": False,
    }
    with torch._dynamo.config.patch(config), patch.object(CausalWanTransformerBlock, "__call__", call):
        yield
