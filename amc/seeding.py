"""Global state, borrowed and given back: random generators, and torch's threads.

Stable-Baselines3 and torch draw from the global generators of Python, NumPy and torch. Whoever needs them seeds them
inside this context, and leaves no trace on its caller's random numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*seed: int | str) -> Iterator[None]:
    """Seeds the global generators from all of `seed` for the body, then restores their states."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    value = derive(*seed)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def threads(number: int | None = None) -> Iterator[None]:
    """Sets torch's CPU threads for the body (unless given, they stay as they are), then restores what was set before.

    The sums of a layer depend on how they are shared out over threads, and small networks run faster on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def derive(*seed: int | str) -> int:
    """A seed below 2^31 that depends on every part of `seed`, the same on every machine."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31
