"""The benchmark's gate stops a wrong implementation, and its memory is measured apart."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_gate_lets_nothing_wrong_pass():
    assert run("-c", "from benchmarks.gate import gate; gate('cpu')").returncode == 0
    wrong = "import posterity.ops.reference as r; r.floor = lambda *_, **__: 1.0\n"
    done = run("-c", wrong + "from benchmarks.gate import gate; gate('cpu')")
    assert done.returncode != 0
    assert "disagrees with float64" in done.stderr


def test_peak_memory_is_that_of_the_optimizer():
    """Parameters, gradients, momentum, Hessian and the kept mean: five sizes."""
    done = run("-m", "benchmarks", "--peak", "IVON", "--numel", "20000000")
    assert done.returncode == 0, done.stderr
    assert 4.9 < float(done.stdout) < 5.3
