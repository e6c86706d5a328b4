"""AdaHessian (Yao et al. 2021, arXiv 2006.00719), pytorch-optimizer's."""

from __future__ import annotations

import pytorch_optimizer
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy


class AdaHessian(pytorch_optimizer.AdaHessian):
    """Adam with Hutchinson's estimate of the Hessian's diagonal: a second backward pass."""

    def backward(self, model: nn.Module, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """Gradients that can be differentiated again; ``share`` times the summed loss."""
        loss = cross_entropy(model(inputs), targets, reduction="sum") * share
        parameters = list(model.parameters())
        for p, g in zip(parameters, grad(loss, parameters, create_graph=True), strict=True):
            p.grad = g
        return loss.detach()
