"""Training steps as CUDA graphs: of a small network, launching costs more than what is launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from posterity import IVON

WARM = 3  # calls in which libraries choose their kernels
CAPTURABLE = (torch.optim.AdamW, torch.optim.SGD, IVON)  # others count steps on the host


def replayable(opt: torch.optim.Optimizer) -> bool:
    """Whether the steps of an optimizer can be captured: all are alike, and on a GPU."""
    first = opt.param_groups[0]
    alike = first.get("hess_every", 1) == 1
    return type(opt) in CAPTURABLE and alike and first["params"][0].is_cuda


def replayed(step: Callable[..., Tensor], opt: torch.optim.Optimizer) -> Callable[..., Tensor]:
    """``step`` as a CUDA graph, if the steps of its optimizer can be captured; before the first.

    lr and counters are then kept where the weights are: a graph reads what a schedule changes.
    """
    if not replayable(opt):
        return step
    for group in opt.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        if "capturable" in group:
            group["capturable"] = True
    return Replayed(step)


def taken_up(
    opt: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    states: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Load what was saved of both, perhaps when steps were replayed on a GPU."""
    built, rates = [group.get("capturable") for group in opt.param_groups], schedule.base_lrs
    opt.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    schedule.base_lrs = rates
    for group, capturable in zip(opt.param_groups, built, strict=True):
        group["lr"] = float(group["lr"])
        if capturable is not None:
            group["capturable"] = capturable


class Replayed:
    """``step(*inputs, **constants)``, which returns a tensor, as a CUDA graph.

    The first calls run as they are; then one is captured, and it and all later ones are replayed,
    on copies of their inputs. Where shapes or constants are others (an epoch's last batch) the step
    runs as it is. Whatever it changes has to be on the GPU: see :func:`replayed`.
    """

    def __init__(self, step: Callable[..., Tensor]):
        self._step = step
        self._seen: Counter[Hashable] = Counter()
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output = torch.empty(())
        self._side: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor, **constants: Hashable) -> Tensor:
        """What ``step`` returns, in memory of its own."""
        key = tuple(x.shape for x in inputs), tuple(constants.items())
        if self._graph is None:
            if self._seen[key] < WARM:
                self._seen[key] += 1
                return self._beside(*inputs, **constants)
            self._key = key
            self._graph = self._captured(*inputs, **constants)
        if key != self._key:
            return self._step(*inputs, **constants)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _beside(self, *inputs: Tensor, **constants: Hashable) -> Tensor:
        """A call as capturing wants it: on another stream than the default one."""
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            output = self._step(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(self._side)
        return output

    def _captured(self, *inputs: Tensor, **constants: Hashable) -> torch.cuda.CUDAGraph:
        """The graph of a call; it is not computed yet."""
        self._inputs = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders have threads
            self._output = self._step(*self._inputs, **constants)
        return graph
