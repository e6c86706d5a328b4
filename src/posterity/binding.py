"""Values under their names, written into a model and taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

Tensors = dict[str, Tensor]


class Samples(Protocol):
    """What prediction needs of a posterior; anything that has it can predict."""

    def state(self, seed: int, index: int) -> Tensors:
        """All that sample ``index`` writes into a model: the weights, and the buffers."""
        ...

    def sampled(self, model: nn.Module, seed: int, index: int) -> AbstractContextManager[nn.Module]:
        """A context in which the model holds sample ``index``."""
        ...


def clean_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add (DDP, FSDP, compile, checkpointing).

    >>> clean_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def some(names: Iterable[str]) -> str:
    """The first few names, for an error message."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def bind(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """For each name, the model's own name of that parameter or buffer, and its tensor.

    Raises:
        ValueError: a name or shape that the model does not have, or a trainable parameter that
            ``values`` does not hold. Frozen parameters and buffers may be absent.
    """
    own: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if own.setdefault(clean_name(name), (name, tensor))[1] is not tensor:
            raise ValueError(f"the model has two tensors named {clean_name(name)!r}")
    bound = {name: own[name] for name in values if name in own}
    held = Counter(id(tensor) for _, tensor in bound.values())
    faults = {
        "not in the model": [name for name in values if name not in own],
        "trainable, but not in the posterior (freeze it, or pass it among the buffers)": [
            clean_name(name)
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in held
        ],
        "of another shape": [
            f"{name} {tuple(values[name].shape)}, in the model {tuple(tensor.shape)}"
            for name, (_, tensor) in bound.items()
            if tensor.shape != values[name].shape
        ],
        "tied in the model, but not in the posterior": [
            name for name, (_, tensor) in bound.items() if held[id(tensor)] > 1
        ],
    }
    found = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"the posterior does not fit the model. {found}")
    return bound


@contextmanager
def kept(model: nn.Module, like: Mapping[str, Tensor]) -> Iterator[Tensors]:
    """A context that yields the model's own tensors of these names, and then restores their bits.

    Raises:
        ValueError: as :func:`bind`.
    """
    own = {name: tensor.detach() for name, (_, tensor) in bind(model, like).items()}
    before = {name: tensor.clone() for name, tensor in own.items()}
    torch.clear_autocast_cache()  # autocast keeps low-precision copies of the weights
    try:
        yield own
    finally:
        fill(own, before)
        torch.clear_autocast_cache()


def fill(targets: Tensors, values: Mapping[str, Tensor]) -> None:
    """Write values into their targets, of any dtype, device or memory format."""
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Tensors:
    """The values under the model's own names, each with its tensor's dtype and device.

    Raises:
        ValueError: as :func:`bind`.
    """
    return {name: values[key].to(like) for key, (name, like) in bind(model, values).items()}


def call(model: nn.Module, batch: Any, state: Tensors | None = None) -> Any:
    """The model's output for a batch: a tensor, or a mapping of keyword arguments.

    Args:
        model: its device is the batch's too.
        batch: moved to the model's device.
        state: tensors under the model's own names that take the place of its own.
    """
    device = next((t.device for t in chain(model.parameters(), model.buffers())), None)
    keywords = {name: _to(value, device) for name, value in items(batch)}
    inputs = (keywords.pop(""),) if "" in keywords else ()
    if state:
        return functional_call(model, state, inputs, keywords)
    return model(*inputs, **keywords)


def items(batch: Any) -> Iterable[tuple[str, Any]]:
    """Keyword arguments; an input that has no keyword is named ''."""
    return batch.items() if isinstance(batch, Mapping) else [("", batch)]


def _to(value: Any, device: torch.device | None) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and device else value


def floats(output: Any) -> Tensor:
    """A model's output, or its ``.logits``, in float32 at least.

    Raises:
        TypeError: it is neither.
    """
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}, not a tensor or .logits")
    return output if output.dtype == torch.float64 else output.float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module's flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
