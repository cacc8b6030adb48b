"""A step that is run over and over on tensors that stay where they are: as it is on a CPU, as a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def replayable(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What to call instead of `step`. On a GPU `step` is run once first: kernels compile, and libraries choose theirs.

    Its tensors may be changed between the calls, in place.
    """
    if device.type != "cuda":
        return step
    torch.cuda.synchronize(device)  # the stream below does not wait for what made the step's tensors
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):  # by default it would capture on the device that was first captured on
        step()
    return graph.replay
