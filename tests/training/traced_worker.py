"""As sharded_worker.py, with what is compiled traced and run as it is: inductor would take ten minutes."""

import sys

from astrolabe_diffusers import CausalWanTransformer3DModel
from tests.training.sharded_worker import main


compile_blocks = CausalWanTransformer3DModel.compile_repeated_blocks
graphs = []


def backend(graph, inputs):
    graphs.append(graph)
    return graph


def compile_traced(self, **kwargs):
    compile_blocks(self, backend=backend, **kwargs)


if __name__ == "__main__":
    CausalWanTransformer3DModel.compile_repeated_blocks = compile_traced
    main(sys.argv[1:])
    assert graphs, "nothing was compiled"
