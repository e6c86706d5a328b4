"""What IVON is compared with, behind IVON's face.

A method is an optimizer. Beside ``step`` it may have ``sampled_params(train=True)``, a context for
a forward and backward pass; ``backward(model, inputs, targets, share)``, where it needs more than
the loss's gradient; and ``posterior(model)``, whose result :func:`posterity.predict` takes.
Laplace's methods and ensembles are made of finished runs instead.

Each is written from its paper where no library has it that installs beside the pinned PyTorch:
laplace-torch, BackPACK and torch-uncertainty need torchvision.
"""

from posterity_studies.baselines.dropout import Dropout, McDropout
from posterity_studies.baselines.ensemble import ensemble, point, together
from posterity_studies.baselines.laplace import diagonal, last_layer
from posterity_studies.baselines.mean_field import BayesByBackprop, Vogn
from posterity_studies.baselines.samples import load
from posterity_studies.baselines.swag import Swag

LAPLACE = {"last-layer Laplace": last_layer, "diagonal Laplace": diagonal}  # of SGD's runs
ENSEMBLES = {"deep ensemble": "sgd", "Multi-IVON": "ivon"}  # of an optimizer's runs

__all__ = [
    "ENSEMBLES", "LAPLACE", "BayesByBackprop", "Dropout", "McDropout", "Swag", "Vogn",
    "diagonal", "ensemble", "last_layer", "load", "point", "together",
]  # fmt: skip
