"""Where there is no GPU, Triton's interpreter runs the CUDA passes on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the passes are first imported
