"""The Open Inference Protocol, version 2, as Triton and KServe speak it: JSON tensors, and Triton's extensions.

https://github.com/kserve/open-inference-protocol; of Triton's extensions binary_tensor_data, model_configuration, statistics,
and the index of model_repository. The input `images` takes pixels (UINT8), or image files (BYTES).
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from cibl_ray.bundle.card import EMBEDDING, IMAGES, LOGITS, MAX_SHIFT, PROBABILITIES, TAIL_SHIFT
from serve.errors import ProblemError, bad_request
from serve.json_body import of_base64, parse_json
from serve.store import Model

HEADER_LENGTH = b"inference-header-content-length"
MAX_NUMBERS = 1 << 18  # of one answer in JSON, which is then of three to five megabytes
SERVER = {
    "name": "cibl-ray",
    "version": "2",
    "extensions": ["binary_tensor_data", "model_configuration", "model_repository", "statistics"],
}
_INPUTS: dict[str, tuple[str, np.dtype[Any]]] = {IMAGES: ("UINT8", np.dtype("u1")), TAIL_SHIFT: ("FP32", np.dtype("<f4"))}


def metadata(model: Model) -> dict[str, Any]:
    """Describe a model's tensors, as `/v2/models/NAME` does.

    Args:
        model: The model.

    Returns:
        The answer's content.
    """
    size, classes = model.engine.runtime.size, len(model.bundle.card.classes)
    outputs = [(LOGITS, classes), (PROBABILITIES, classes)]
    if model.engine.runtime.has_embedding:
        outputs.append((EMBEDDING, -1))
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": IMAGES, "datatype": "UINT8", "shape": [-1, size, size, 3]},
            {"name": TAIL_SHIFT, "datatype": "FP32", "shape": [-1], "parameters": {"optional": True}},
        ],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, width]} for name, width in outputs],
    }


def configuration(model: Model, max_batch: int) -> dict[str, Any]:
    """Describe a model as Triton's `/v2/models/NAME/config` does, whose clients (perf_analyzer) read it.

    Args:
        model: The model.
        max_batch: Images of one request at most.

    Returns:
        The fields of ModelConfig, without those that have no meaning here. Shapes are without the batch.
    """
    found = metadata(model)

    def tensors(kind: str) -> list[dict[str, Any]]:
        return [
            {"name": part["name"], "data_type": f"TYPE_{part['datatype']}", "dims": part["shape"][1:] or [1]}
            | ({"optional": True} if "parameters" in part else {})
            for part in found[kind]
        ]

    return {
        "name": model.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": tensors("inputs"),
        "output": tensors("outputs"),
        "dynamic_batching": {},
        "default_model_filename": model.bundle.models[model.engine.runtime.card.precision].path.name,
    }


def statistics(model: Model) -> dict[str, Any]:
    """Count what a model has done in this replica since it was loaded, as Triton's `/v2/models/NAME/stats` does.

    Args:
        model: The model.

    Returns:
        The answer's content.
    """
    counted = model.statistics
    none = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": counted.last,
        "inference_count": counted.images,
        "execution_count": model.engine.batches,
        "inference_stats": {
            "success": {"count": counted.requests, "ns": counted.nanoseconds},
            "fail": {"count": counted.failures, "ns": counted.failure_nanoseconds},
            "queue": none,
            "compute_input": none,
            "compute_infer": {"count": model.engine.batches, "ns": model.engine.nanoseconds},
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [],
    }


class Inference:
    """One request.

    Attributes:
        images: uint8 (n, S, S, 3). Where the request has image files, the caller sets it from `files`.
        files: Image files, of a BYTES tensor; else empty.
        shift: float32 (n,), or None.
    """

    def __init__(self, model: Model, body: bytes, header_length: bytes | None, max_images: int) -> None:
        """Read a request.

        Args:
            model: Which it asks.
            body: JSON, and binary tensors after it.
            header_length: Bytes of the JSON, if binary tensors follow.
            max_images: n at most.

        Raises:
            ProblemError: It is not valid, or too much.
        """
        self._model = model
        size = model.engine.runtime.size
        content, binary = _split(body, header_length, max_images * (3 * size * size + 1))
        self.id = content.get("id")
        if self.id is not None and not isinstance(self.id, str):
            raise bad_request("id must be a string")
        self.files: list[bytes] = []
        tensors = self._tensors(content.get("inputs"), binary, max_images)
        if self.files:
            count = len(self.files)
            self.images = np.empty((0, size, size, 3), np.uint8)
        elif IMAGES in tensors:
            self.images = tensors[IMAGES]
            if self.images.ndim != 4 or self.images.shape[1:] != (size, size, 3):
                raise bad_request(f"{IMAGES!r} must have the shape [n, {size}, {size}, 3], not {list(self.images.shape)}")
            count = len(self.images)
        else:
            raise bad_request(f"the input {IMAGES!r} is missing")
        if not 1 <= count <= max_images:
            raise bad_request(f"{IMAGES!r} has {count} images; 1 to {max_images} are taken")
        self.shift = None
        if TAIL_SHIFT in tensors:
            shift = tensors[TAIL_SHIFT].ravel()
            if tensors[TAIL_SHIFT].ndim > 2 or len(shift) not in (1, count):
                wrong = list(tensors[TAIL_SHIFT].shape)
                raise bad_request(f"{TAIL_SHIFT!r} must have the shape [1] or [{count}], not {wrong}")
            if not (np.abs(shift) <= MAX_SHIFT).all():  # false for NaN too
                raise bad_request(f"{TAIL_SHIFT!r} must be numbers from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
            self.shift = np.ascontiguousarray(np.broadcast_to(shift, count), dtype=np.float32)
        self._outputs = self._wanted(content)
        classes = len(model.bundle.card.classes)  # before the images are decoded; an embedding's width is not known here
        self._limit(sum(count * classes for name, as_binary in self._outputs.items() if not as_binary and name != EMBEDDING))

    @property
    def embedding(self) -> bool:
        """Whether the embedding is wanted."""
        return EMBEDDING in self._outputs

    def _tensors(self, inputs: Any, binary: memoryview, max_images: int) -> dict[str, np.ndarray]:
        """The tensors that are numbers, by name; image files go to `files`."""
        if not isinstance(inputs, list) or not all(isinstance(part, dict) for part in inputs):
            raise bad_request("inputs must be a list of tensors")
        tensors: dict[str, np.ndarray] = {}
        for part in inputs:
            name, shape = part.get("name"), part.get("shape")
            if not isinstance(name, str) or name not in _INPUTS:
                raise bad_request(f"unknown input; there are {IMAGES!r} and {TAIL_SHIFT!r}")
            if name in tensors or (name == IMAGES and self.files):
                raise bad_request(f"the input {name!r} comes twice")
            kind, dtype = _INPUTS[name]
            encoded = name == IMAGES and part.get("datatype") == "BYTES"
            if part.get("datatype") != kind and not encoded:
                raise bad_request(f"the datatype of {name!r} must be {kind}{' or BYTES' if name == IMAGES else ''}")
            if (
                not isinstance(shape, list)
                or not 1 <= len(shape) <= 4
                or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
            ):
                raise bad_request(f"the shape of {name!r} must be a list of one to four numbers")
            parameters = part.get("parameters") or {}
            size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
            count = math.prod(shape)
            if count == 0:
                raise bad_request(f"{name!r} is empty: its shape is {shape}")
            if encoded:
                if count > max_images:
                    raise ProblemError(413, "too_many", f"{count} images, {max_images} at most")
                if size is None:
                    self.files = _texts(name, part.get("data"), count)
                else:
                    if type(size) is not int or not 0 < size <= len(binary):
                        raise bad_request(f"{name!r}: binary_data_size must be the bytes of the tensor, and the body hold them")
                    self.files = _elements(name, binary[:size], count)
                    binary = binary[size:]
            elif size is not None:
                if type(size) is not int or size != count * dtype.itemsize or size > len(binary):
                    needed = count * dtype.itemsize
                    raise bad_request(
                        f"{name!r}: binary_data_size must be {needed:,}, as its shape says, and the body hold so many bytes"
                    )
                tensors[name] = np.frombuffer(binary[:size], dtype).reshape(shape)
                binary = binary[size:]
            else:
                tensors[name] = _from_json(name, part.get("data"), dtype, shape, count)
        if len(binary):
            raise bad_request(f"{len(binary)} bytes after the tensors belong to none")
        return tensors

    def _wanted(self, content: dict[str, Any]) -> dict[str, bool]:
        """Output name -> whether it is binary."""
        available = [output["name"] for output in metadata(self._model)["outputs"]]
        parameters = content.get("parameters") or {}
        default = bool(parameters.get("binary_data_output")) if isinstance(parameters, dict) else False
        outputs = content.get("outputs")
        if outputs is None:
            return dict.fromkeys((LOGITS, PROBABILITIES), default)
        if not isinstance(outputs, list) or not outputs or not all(isinstance(part, dict) for part in outputs):
            raise bad_request("outputs must be a list of names")
        wanted: dict[str, bool] = {}
        for part in outputs:
            name, of_part = part.get("name"), part.get("parameters") or {}
            if name not in available:
                raise bad_request(f"unknown output; there are {', '.join(available)}")
            if isinstance(of_part, dict) and of_part.get("classification"):
                raise bad_request("the classification extension is not spoken here; /v1/predict gives labels")
            wanted[name] = bool(of_part.get("binary_data", default)) if isinstance(of_part, dict) else default
        return wanted

    @staticmethod
    def _limit(numbers: int) -> None:
        """Refuse an answer of so many numbers in JSON, if they are too many."""
        if numbers > MAX_NUMBERS:
            problem = f"an answer of {numbers:,} numbers in JSON, {MAX_NUMBERS:,} at most"
            raise ProblemError(413, "too_many", f"{problem}; send fewer images, or ask for binary outputs")

    def answer(self, result: dict[str, np.ndarray]) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Make the answer.

        Args:
            result: Output name -> float32 (n, width).

        Returns:
            Its headers and its body.

        Raises:
            ProblemError: It would be too large (413).
        """
        self._limit(sum(result[name].size for name, as_binary in self._outputs.items() if not as_binary))
        outputs, binary = [], []
        for name, as_binary in self._outputs.items():
            values = np.ascontiguousarray(result[name], dtype="<f4")
            part: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
            if as_binary:
                binary.append(values.tobytes())
                part["parameters"] = {"binary_data_size": values.nbytes}
            else:
                part["data"] = values.ravel().tolist()
            outputs.append(part)
        content: dict[str, Any] = {"model_name": self._model.name, "model_version": self._model.version, "outputs": outputs}
        if self.id is not None:
            content["id"] = self.id
        head = json.dumps(content).encode()
        if not binary:
            return [(b"content-type", b"application/json")], head
        headers = [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, str(len(head)).encode())]
        return headers, head + b"".join(binary)


def _split(body: bytes, header_length: bytes | None, values: int) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(body)
    length = len(body)
    if header_length is not None:
        if not header_length.isdigit() or len(header_length) > 10 or int(header_length) > len(body):
            raise bad_request("Inference-Header-Content-Length is not a length within the body")
        length = int(header_length)
    return parse_json(body[:length], values), view[length:]


def _elements(name: str, binary: memoryview, count: int) -> list[bytes]:
    """The elements of a binary BYTES tensor: each after its length, four bytes, little-endian."""
    files: list[bytes] = []
    while len(binary) >= 4 and len(files) < count:
        length = int.from_bytes(binary[:4], "little")
        if length > len(binary) - 4:
            break
        files.append(bytes(binary[4 : 4 + length]))
        binary = binary[4 + length :]
    if len(files) != count or len(binary) or not all(files):
        raise bad_request(f"{name!r}: the binary data must be {count} image files, each after its length in four bytes")
    return files


def _texts(name: str, data: Any, count: int) -> list[bytes]:
    """The elements of a BYTES tensor in JSON, which has no bytes: base64."""
    while isinstance(data, list) and len(data) == 1 and isinstance(data[0], list):
        data = data[0]
    rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in data] if isinstance(data, list) else []
    if len(rows) != count or not all(isinstance(row, str) and row for row in rows):
        raise bad_request(f"{name!r}: data must be {count} image files in base64")
    return [of_base64(row) for row in rows]


def _from_json(name: str, data: Any, dtype: np.dtype[Any], shape: list[int], count: int) -> np.ndarray:
    wrong = bad_request(f"{name!r}: data must be {count} numbers that its datatype holds")
    allowed = (int,) if dtype.kind == "u" else (int, float)
    flat: list[Any] = []
    open_ = [iter(data)] if isinstance(data, list) else []
    while open_:
        for value in open_[-1]:  # a list nested as the shape, or flat; no more of it is taken than there may be
            if type(value) is list and len(open_) < 8:
                open_.append(iter(value))
                break
            if type(value) not in allowed or len(flat) == count:
                raise wrong
            flat.append(value)
        else:
            open_.pop()
    if len(flat) != count:
        raise wrong
    try:  # bytes take 0 to 255 alone
        values = np.frombuffer(bytes(flat), dtype) if dtype.kind == "u" else np.array(flat, dtype)
        return values.reshape(shape)
    except (OverflowError, ValueError) as error:
        raise wrong from error
