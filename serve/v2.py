"""The Open Inference Protocol, version 2, as Triton and KServe speak it: JSON tensors, and the binary extension.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from cibl_ray.bundle.card import EMBEDDING, IMAGES, LOGITS, PROBABILITIES, TAIL_SHIFT
from serve.decode import MAX_SHIFT
from serve.errors import ProblemError, bad_request
from serve.store import Model

HEADER_LENGTH = b"inference-header-content-length"
LARGE = 256 << 10  # bytes of a body that is read in a thread
_MORE_VALUES = 1000  # of JSON, beside what its images need
_DEEPEST = 10  # lists that begin one in another: a tensor of images has four
_INPUTS: dict[str, tuple[str, np.dtype[Any]]] = {IMAGES: ("UINT8", np.dtype("u1")), TAIL_SHIFT: ("FP32", np.dtype("<f4"))}


def metadata(model: Model) -> dict[str, Any]:
    """What a client may send and will get."""
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


class Inference:
    """One request: images uint8 (n, S, S, 3), shift float32 (n,) or None, and how its outputs are wanted. Raises
    ProblemError."""

    def __init__(self, model: Model, body: bytes, header_length: bytes | None, max_images: int) -> None:
        self._model = model
        size = model.engine.runtime.size
        content, binary = _split(body, header_length, max_images * (3 * size * size + 1))
        self.id = content.get("id")
        if self.id is not None and not isinstance(self.id, str):
            raise bad_request("id must be a string")
        tensors = self._tensors(content.get("inputs"), binary)
        if IMAGES not in tensors:
            raise bad_request(f"the input {IMAGES!r} is missing")
        self.images = tensors[IMAGES]
        if self.images.ndim != 4 or self.images.shape[1:] != (size, size, 3):
            raise bad_request(f"{IMAGES!r} must have the shape [n, {size}, {size}, 3], not {list(self.images.shape)}")
        if not 1 <= len(self.images) <= max_images:
            raise bad_request(f"{IMAGES!r} has {len(self.images)} images; 1 to {max_images} are taken")
        self.shift = None
        if TAIL_SHIFT in tensors:
            shift = tensors[TAIL_SHIFT]
            if shift.ndim != 1 or len(shift) not in (1, len(self.images)):
                raise bad_request(f"{TAIL_SHIFT!r} must have the shape [1] or [{len(self.images)}], not {list(shift.shape)}")
            if not (np.abs(shift) <= MAX_SHIFT).all():  # false for NaN too
                raise bad_request(f"{TAIL_SHIFT!r} must be numbers from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
            self.shift = np.ascontiguousarray(np.broadcast_to(shift, len(self.images)), dtype=np.float32)
        self._outputs = self._wanted(content)

    @property
    def embedding(self) -> bool:
        return EMBEDDING in self._outputs

    def _tensors(self, inputs: Any, binary: memoryview) -> dict[str, np.ndarray]:
        if not isinstance(inputs, list) or not all(isinstance(part, dict) for part in inputs):
            raise bad_request("inputs must be a list of tensors")
        tensors: dict[str, np.ndarray] = {}
        for part in inputs:
            name, shape = part.get("name"), part.get("shape")
            if not isinstance(name, str) or name not in _INPUTS:
                raise bad_request(f"unknown input; there are {IMAGES!r} and {TAIL_SHIFT!r}")
            if name in tensors:
                raise bad_request(f"the input {name!r} comes twice")
            kind, dtype = _INPUTS[name]
            if part.get("datatype") != kind:
                raise bad_request(f"the datatype of {name!r} must be {kind}")
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
            if size is not None:
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
        """Output name -> whether in binary."""
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

    def answer(self, result: dict[str, np.ndarray]) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """(headers, body)."""
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


def parse_json(text: bytes, values: int, texts: int = 0) -> dict[str, Any]:
    """A JSON object of a client. values: that its images need at most; texts: how many of them are no numbers. Raises
    ProblemError."""
    most = values + _MORE_VALUES
    # Counted before it is parsed: a value of two bytes would take a hundred.
    if (count := text.count(b",")) > most:
        raise ProblemError(413, "too_many", f"JSON of {count:,} values, {most:,} at most")
    # json holds Python's lock from end to end, unless it calls Python: numbers in plenty must not hold up the event loop.
    calls: dict[str, Any] = {"parse_int": lambda digits: int(digits), "parse_float": lambda digits: float(digits)}
    if len(text) > LARGE:
        _check_large(text, texts)
    try:
        content = json.loads(text, **(calls if len(text) > LARGE else {}))
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not valid JSON") from error
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object")
    return content


def _check_large(text: bytes, texts: int) -> None:
    """Raise ProblemError where a parser would make much of values at which it calls no Python: all but numbers."""
    if b"\0" in text:  # UTF-16 or 32, in which the counts below would find nothing
        raise bad_request("the body is not JSON in UTF-8")
    text = text.translate(None, b" \t\r\n")
    other = sum(text.count(word) for word in (b"[]", b"{}", b"true", b"false", b"null")) + text.count(b'"') // 2
    if other > texts + _MORE_VALUES:
        raise ProblemError(413, "too_many", f"JSON of {other:,} values that are no numbers, {texts + _MORE_VALUES:,} at most")
    if b"[" * _DEEPEST in text:
        raise bad_request(f"the body is not valid JSON for this service: lists in lists, {_DEEPEST} deep")


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
