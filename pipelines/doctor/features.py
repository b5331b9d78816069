"""Features of every image by the pretrained network that comes as a package, for the findings that need to see the content."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.progress import counted
from pipelines.common.threads import in_threads
from pipelines.config import DataConfig
from pipelines.doctor.examine import Examined, Look
from pipelines.packaged_weights import packaged, to_timm
from pipelines.pixels import BadImageError, EvalRule

_MODEL = "tf_efficientnet_lite0"
_SIZE, _SMALL = 224, 128  # pixels of the network's input, and of that for data sets of pictures no larger
_AT_ONCE = 4  # images of a thread's batch: their activations stay in a core's cache

Network = Callable[[np.ndarray], np.ndarray]
"""Pixels uint8 (B, S, S, 3) to features float32 (B, d)."""


def installed() -> bool:
    """Whether torch, timm and the package with the network's weights are here."""
    found = all(importlib.util.find_spec(package) is not None for package in ("torch", "timm"))
    return found and packaged(_MODEL) is not None


def image_features(examined: Examined, data: DataConfig, network: Network | None = None) -> np.ndarray:
    """Compute the features of all images.

    Args:
        examined: What was seen of the images.
        data: Limits for large images, and the window of deep ones.
        network: By default EfficientNet-Lite0 with its ImageNet weights, on the GPU where there is one.

    Returns:
        float32 (N, d), each row of length 1. Rows of images that cannot be read are NaN.
    """
    good = [number for number, look in enumerate(examined.look) if isinstance(look, Look)]
    sides = [max(look.width, look.height) for look in examined.look if isinstance(look, Look)]
    size = _SMALL if sides and float(np.median(sides)) <= _SMALL else _SIZE
    rule = EvalRule(size, 0.875, window=data.window, interpolation="bicubic")
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(_offline_network()) if network is None else network

        def work(chunk: list[int]) -> np.ndarray:
            pixels, readable = [], []
            for number in chunk:
                # An image may go, or the network fail, between two looks at it.
                with contextlib.suppress(BadImageError, UserError, OSError):
                    pixels.append(rule(examined.image(number, data)))
                    readable.append(number)
            features = run(np.stack(pixels)) if pixels else np.zeros((0, 1), np.float32)
            rows = np.full((len(chunk), features.shape[1]), np.nan, np.float32)
            rows[np.isin(chunk, readable)] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            return rows

        chunks = [good[begin : begin + _AT_ONCE] for begin in range(0, len(good), _AT_ONCE)]
        parts = stack.enter_context(contextlib.closing(in_threads(work, chunks)))
        found = [*counted((row for rows in parts for row in rows), len(good), "doctor: features")]
    width = max((len(row) for row in found), default=1)
    features = np.full((len(examined.look), width), np.nan, np.float32)
    for number, row in zip(good, found, strict=True):
        if len(row) == width:
            features[number] = row
    return features


@contextlib.contextmanager
def _offline_network() -> Iterator[Network]:
    import timm
    import torch

    found = packaged(_MODEL)
    assert found is not None
    network = timm.create_model(_MODEL, pretrained=False, num_classes=0).eval()
    tensors = to_timm(torch.load(found[1], map_location="cpu", weights_only=True))
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    config = timm.models.get_pretrained_cfg(_MODEL)
    assert config is not None
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.mean, config.std))

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255
        features: np.ndarray = network((images - mean) / std).float().cpu().numpy()
        return features

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of `in_threads` computes by itself
    try:
        yield run
    finally:
        torch.set_num_threads(threads)
