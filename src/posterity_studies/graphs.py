"""Training steps as CUDA graphs: of a small network, launching costs more than what is launched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM = 3  # calls in which libraries choose their kernels


class Replayed:
    """``step(*inputs, **constants)``, which returns a tensor, as a CUDA graph.

    The first calls run as they are; then one is captured, and it and all later ones are replayed,
    on copies of their inputs. Where shapes or constants are others (an epoch's last batch), or
    there is no GPU, the step runs as it is. Whatever it changes has to be on the GPU, an
    optimizer's counters too.
    """

    def __init__(self, step: Callable[..., Tensor]):
        self._step = step
        self._warm = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._key: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(())

    def __call__(self, *inputs: Tensor, **constants: object) -> Tensor:
        """What ``step`` returns, in memory of its own."""
        key = [x.shape for x in inputs], constants
        if not inputs[0].is_cuda or (self._graph and key != self._key):
            return self._step(*inputs, **constants)
        if self._warm < WARM:
            self._warm += 1
            return self._beside(*inputs, **constants)
        if not self._graph:
            self._key = key
            self._graph = self._captured(*inputs, **constants)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _beside(self, *inputs: Tensor, **constants: object) -> Tensor:
        """A call as capturing wants it: on another stream than the default one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._step(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _captured(self, *inputs: Tensor, **constants: object) -> torch.cuda.CUDAGraph:
        """The graph of a call; it is not computed yet."""
        self._inputs = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._step(*self._inputs, **constants)
        return graph
