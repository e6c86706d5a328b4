"""A stand-in for a posterior out of Adam's second moments, to compare with."""

from __future__ import annotations

import torch
from torch import nn

from ..binding import clean_name, some
from ..posterior import Posterior


def adam_posterior(
    optimizer: torch.optim.Optimizer, model: nn.Module, n_train: int, prior_precision: float
) -> Posterior:
    r"""N(θ, diag 1/(N√v̂ + δ)) with Adam's v̂, the second moment of its gradients without the bias.

    √v̂ is no Hessian, so this is what one can have without variational learning, not more.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW`` (also with other names, if their state has
            ``exp_avg_sq`` and ``step``), after at least one step.
        model: its parameters are those of the optimizer; those that are not trained, and the
            buffers, come along.
        n_train: N, the number of training examples; the loss is a batch mean.
        prior_precision: δ, of the prior on the weights: the L2 penalty times N.

    Raises:
        ValueError: a trainable parameter has no second moment.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(4, 2)).mean().backward()
        >>> optimizer.step()
        >>> adam_posterior(optimizer, model, n_train=100, prior_precision=1.0)
        Posterior(2 tensors, 3 parameters, ess=100)

    Source: Shen et al. 2024, arXiv 2402.17641, section 4.4; Khan et al. 2018, arXiv 1806.04854.
    """
    beta2 = {p: group["betas"][1] for group in optimizer.param_groups for p in group["params"]}
    named = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state
    if odd := [n for n, p in named.items() if p not in beta2 or "exp_avg_sq" not in state[p]]:
        raise ValueError(f"no second moments (take a step first): {some(odd)}")
    precision = {}
    for name, p in named.items():
        unbiased = state[p]["exp_avg_sq"].float() / (1 - beta2[p] ** float(state[p]["step"]))
        precision[name] = n_train * unbiased.sqrt() + prior_precision
    rest = dict(model.named_buffers())
    rest |= {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return Posterior(named, precision, prior_precision=prior_precision, ess=n_train, buffers=rest)
