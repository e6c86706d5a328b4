"""``python -m posterity``: what runs on this machine, and why; for a report of a fault."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import __version__, ops

PEERS = ("numpy", "safetensors", "triton", "lightning", "transformers", "accelerate", "peft")


def report() -> dict[str, str]:
    """Versions, and the implementation that IVON takes on each kind of device here."""
    found = {"posterity": __version__, "python": platform.python_version()}
    found |= {"platform": platform.platform(), "torch": torch.__version__}
    found |= {name: _version(name) for name in PEERS}
    found["on a CPU"] = ops.describe([torch.zeros(1)], None)
    if torch.cuda.is_available():
        name, p = torch.cuda.get_device_name(), torch.zeros(1, device="cuda")
        found[f"on {name}"] = ops.describe([p], None)
    else:
        found["on a GPU"] = "PyTorch finds none"
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    for key, value in report().items():
        print(f"{key:12}  {value}")
