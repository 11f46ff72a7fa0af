"""The training loop of all stages."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


EMA_DECAY = 0.998
# Steps between two saves, at each of which the random numbers begin anew: a resumed stage ends as an unbroken one.
SAVE_STEPS = 500


def optimize(
    name: str,
    model: nn.Module,
    loss_fn: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    resume: Path,
):
    """AdamW with warm-up and cosine decay; the model ends as the moving average of its weights.

    On a GPU the whole step is captured once as a CUDA graph and replayed: these models are so small that launching
    their kernels one by one takes ten times as long as running them. So `loss_fn` must draw its batch from tensors on
    the device, with the default random generator, and never wait for the device.

    Args:
        resume: the file in which the state is kept while the stage runs; where it exists, the stage goes on from it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    averages = [p.detach().clone() for p in parameters]
    lr = torch.tensor(0.0, device=device)
    running = torch.zeros((), device=device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, capturable=cuda, foreach=cuda
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, parameters):
                average.lerp_(parameter, 1 - EMA_DECAY)
            running.lerp_(loss.detach(), 0.01)

    # The first steps, at a rate of 0, make the optimizer's state, which is then filled in place: a graph knows
    # addresses.
    initial = [p.detach().clone() for p in parameters]
    run = capture(step) if cuda else step
    if not cuda:
        step()
    moments = [optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
    state = [*parameters, *averages, *moments, running]
    begin = 0
    with torch.no_grad():
        if resume.is_file():
            saved = torch.load(resume, map_location=device)
            begin, values = saved["step"], saved["state"]
        else:
            values = [*initial, *initial, *(torch.zeros_like(m) for m in moments), torch.zeros_like(running)]
        for tensor, value in zip(state, values):
            tensor.copy_(value)

    began = time.time()
    for i in range(begin, steps):
        if i % SAVE_STEPS == 0:
            if i > begin:
                torch.save({"step": i, "state": state}, partial := resume.with_suffix(".partial"))
                partial.replace(resume)
            torch.manual_seed(seed + i)
        lr.fill_(learning_rate * min(1.0, (i + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * i / steps)))
        run()
        if i % SAVE_STEPS == 0 or i == steps - 1:
            print(f"{name} {i:6d}/{steps} loss {running.item():.4f} {time.time() - began:.0f} s", flush=True)
    with torch.no_grad():
        for average, parameter in zip(averages, parameters):
            parameter.copy_(average)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Run `step` three times, as capturing asks for, and return the replay of the fourth."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
