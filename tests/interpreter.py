"""Where tests of Triton kernels run: on the device where there is one, else through Triton's interpreter.

The interpreter is chosen when Triton is imported, so a test file runs itself once more, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = CUDA or INTERPRETED
direct = pytest.mark.skipif(not HERE, reason="run through the interpreter")


def interpreted(file: str, select: str = "") -> str:
    """Run a test file (or what ``-k`` selects of it) through the interpreter and return what pytest said; it must pass.

    Where the kernels run directly there is nothing to do: the caller is skipped.
    """
    if HERE:
        pytest.skip("the checks run directly here")
    which = ["-k", select] if select else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", *which, file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout
