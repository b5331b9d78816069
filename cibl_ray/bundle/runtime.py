"""An ONNX file in an onnxruntime session: the provider that was asked for, or an error; never another one silently."""

from __future__ import annotations

import ctypes
import io
import logging
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from cibl_ray.bundle.card import EMBEDDING, IMAGES, LOG_PRIOR, LOGITS, METADATA, PROBABILITIES, TAIL_SHIFT, Card, read_card
from cibl_ray.bundle.ort import onnxruntime
from cibl_ray.bundle.targets import misfit
from pipelines.common.errors import UserError

log = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
# What must load before a provider is worth trying: the GPU build lists CUDA and TensorRT on every machine.
_LIBRARIES = {"tensorrt": ("libcuda.so.1", "libnvinfer.so.10"), "cuda": ("libcuda.so.1",), "cpu": ()}


class Runtime:
    """A model that answers for uint8 images (N, S, S, 3), any N.

    Attributes:
        session: The session of onnxruntime.
        provider: Its provider, by onnxruntime's name.
        card: What the file says of itself.
        has_embedding: Whether the file has the output `embedding`.
    """

    def __init__(self, model: Path, provider: Provider = "auto", threads: int | None = None) -> None:
        """Load a file.

        Args:
            model: The ONNX file.
            provider: Where it runs; 'auto': the first of TensorRT, CUDA and CPU that this machine has.
            threads: Threads of onnxruntime within one call; None: all cores.

        Raises:
            UserError: The file cannot be loaded, is not a model of cibl-ray, or the provider is not available.
        """
        self.session = _open(model, provider, threads)
        self.provider = self.session.get_providers()[0]
        properties = self.session.get_modelmeta().custom_metadata_map
        if METADATA not in properties:
            raise UserError(f"{str(model)!r} is not a model that cibl-ray exported: its metadata lack {METADATA!r}")
        self.card: Card = read_card(properties[METADATA], str(model))
        outputs = {output.name for output in self.session.get_outputs()}
        self.has_embedding = EMBEDDING in outputs
        self._gives_prior = LOG_PRIOR in outputs  # files of earlier versions have the input `tail_shift` instead
        # Other providers add up int8 in another way.
        if self.card.precision == "int8" and self.provider == PROVIDERS["cpu"] and (problem := misfit(self.card.source)):
            log.warning("%r %s", str(model), problem)

    @property
    def size(self) -> int:
        """Width and height of an image, in pixels."""
        return self.card.rule.size

    def __call__(
        self, images: np.ndarray, tail_shift: np.ndarray | None = None, outputs: tuple[str, ...] = (LOGITS, PROBABILITIES)
    ) -> list[np.ndarray]:
        """Run the model: logits - tail_shift * log prior, and what follows from them.

        Args:
            images: uint8 (N, S, S, 3).
            tail_shift: float32 (N,) or (1,), finite, counted from the card's; None: 0.
            outputs: The outputs' names.

        Returns:
            The outputs, float32 (N, C); `embedding` is float32 (N, d).
        """
        feeds = {IMAGES: images}
        if tail_shift is None:
            return self.session.run(list(outputs), feeds)
        if not self._gives_prior:
            return self.session.run(list(outputs), {**feeds, TAIL_SHIFT: tail_shift})
        names = list(dict.fromkeys((*outputs, LOGITS, LOG_PRIOR)))
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        found[LOGITS] = found[LOGITS] - tail_shift[:, None] * found[LOG_PRIOR]
        if PROBABILITIES in outputs:
            found[PROBABILITIES] = _softmax(found[LOGITS])
        return [found[name] for name in outputs]


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, C)."""
    powers: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _open(model: Path, provider: Provider, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # An idle server must not keep its cores spinning for work that may come.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = [provider] if provider != "auto" else [name for name in PROVIDERS if usable(name)]
    for name in wanted:
        full = PROVIDERS[name]
        if full not in onnxruntime.get_available_providers():
            if provider == "auto":
                continue
            raise UserError(
                f"provider {name!r}: this build of onnxruntime has no {full}; install onnxruntime-gpu, or use 'cpu'"
            )
        # Full float32 on GPUs: TF32 is not what was verified.
        settings = {"use_tf32": "0"} if name == "cuda" else {}
        if name != "cpu":
            _load_cuda()
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=[(full, settings)])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise UserError(f"{str(model)!r} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from error
        if session.get_providers()[0] == full:
            session.disable_fallback()
            return session
        if provider != "auto":
            raise UserError(
                f"provider {name!r} does not run on this machine (onnxruntime fell back); use 'cpu', or mend its libraries"
            )
    raise UserError(f"no provider of onnxruntime runs {str(model)!r} here")


@cache
def _load_cuda() -> None:
    """Load CUDA's libraries from Python packages that are not on the loader's path, unless torch has loaded them.

    onnxruntime prints which libraries it does not find; a session that needs one raises its own error.
    """
    with redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def usable(provider: str) -> bool:
    """Say whether the libraries that a provider needs can be loaded here.

    Args:
        provider: 'tensorrt', 'cuda' or 'cpu'.

    Returns:
        Whether they can.
    """
    try:
        for library in _LIBRARIES[provider]:
            ctypes.CDLL(library)
    except OSError:
        return False
    return True
