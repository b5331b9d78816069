"""One seed for everything: independent, named random streams that can be entered at any point of a run."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, *keys: str | int) -> np.random.Generator:
    """A generator that depends on `seed` and `keys` alone, so that epoch 7 draws the same whether or not epoch 6 ran.

    Words are hashed, numbers taken as they are; streams of different keys are independent.
    """
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *numbers])))


def torch_seed(seed: int, *keys: str | int) -> int:
    """A seed for torch's generators, from the same named streams."""
    return int(stream(seed, *keys).integers(0, 2**63 - 1))
