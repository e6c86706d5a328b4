"""Variational learning of deep networks: IVON, and the Gaussian posterior it leaves."""

from . import language, metrics
from .batchnorm import update_bn
from .distributed import reduce_per_rank
from .ivon import IVON
from .merging import merge
from .mixture import Mixture
from .perturbation import leave_one_out, sensitivity
from .posterior import Posterior
from .prediction import Prediction, predict

__all__ = [
    "IVON",
    "Mixture",
    "Posterior",
    "Prediction",
    "language",
    "leave_one_out",
    "merge",
    "metrics",
    "predict",
    "reduce_per_rank",
    "sensitivity",
    "update_bn",
]
__version__ = "0.1.0"
