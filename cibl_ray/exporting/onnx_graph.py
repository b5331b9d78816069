"""A network as ONNX files: uint8 pixels in, normalisation inside, and what a client needs to shift the answers itself.

    images uint8 (N, S, S, 3) ──► base graph ──► raw logits ──► − default shift · log prior ──► logits ──► softmax ──►
    probabilities; beside them log_prior

The base graph is converted to float16 or int8; what follows it stays in float32. The log prior is an output, because no kind of
optional input works in every runtime (docs/lab-notes/onnx-runtimes.md).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cibl_ray.bundle.card import EMBEDDING, IMAGES, LOG_PRIOR, LOGITS, METADATA, PROBABILITIES
from cibl_ray.bundle.ort import onnxruntime
from cibl_ray.bundle.targets import Target
from cibl_ray.networks.network import HybridNetwork
from pipelines.config import DataConfig

_RAW = "raw_logits"
_COUNTED = 6_000_000  # bytes of images


class _Served(nn.Module):
    """uint8 (N, S, S, 3) to raw logits (N, C), and the unit embedding (N, d) where it is asked for."""

    def __init__(self, network: HybridNetwork, data: DataConfig, embedding: bool) -> None:
        super().__init__()
        self.network, self.embedding = network, embedding
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("factor", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).view(1, 3, 1, 1))
        self.factor: torch.Tensor
        self.offset: torch.Tensor

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = images.permute(0, 3, 1, 2).float() * self.factor + self.offset
        h = self.network.features(x)
        logits = self.network.head(h)
        if not self.embedding:
            return (logits,)
        project = self.network.projection
        return logits, project(h) if project is not None else nn.functional.normalize(h, dim=1)


def export_base(network: HybridNetwork, data: DataConfig, embedding: bool, path: Path) -> None:
    """Write the base graph in one file, for any batch size.

    Args:
        network: The network, in evaluation mode.
        data: Size, mean and standard deviation of its images.
        embedding: Whether the graph has the image's unit embedding as a second output.
        path: The file.
    """
    served = _Served(network, data, embedding).eval()
    example = torch.zeros(2, data.size, data.size, 3, dtype=torch.uint8)  # a batch of 1 would be taken for a constant
    torch.onnx.export(
        served,
        (example,),
        str(path),
        input_names=[IMAGES],
        output_names=[_RAW, EMBEDDING] if embedding else [_RAW],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def finish(base: Path, path: Path, train_counts: np.ndarray, card: dict[str, Any], default_shift: float = 0.0) -> None:
    """Add what follows the raw logits, and the metadata; check; write to `path`.

    Args:
        base: The base graph.
        path: The finished model.
        train_counts: Training images of each class, (C,).
        card: The metadata.
        default_shift: The shift that is in the logits already; a client's own counts from there.
    """
    model = onnx.load(base)
    graph = model.graph
    log_prior = np.log(train_counts / train_counts.sum()).astype(np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(log_prior[None], "log_prior_row"),
            numpy_helper.from_array(np.float32(default_shift) * log_prior, "default_shift_logits"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Sub", [_RAW, "default_shift_logits"], [LOGITS]),
            helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=1),
            # A row for each image, so that every output has the batch: servers that batch (Triton) ask for that.
            helper.make_node("Shape", [LOGITS], ["logits_shape"]),
            helper.make_node("Expand", ["log_prior_row", "logits_shape"], [LOG_PRIOR]),
        ]
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    shape = [batch, len(train_counts)]
    others = [output for output in graph.output if output.name != _RAW]
    del graph.output[:]
    named = (LOGITS, PROBABILITIES, LOG_PRIOR)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in named)
    graph.output.extend(others)
    helper.set_model_props(model, {METADATA: json.dumps(card)})
    model.producer_name = "cibl-ray"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def to_fp16(base: Path, path: Path) -> None:
    """Convert the base graph to float16 weights and arithmetic. Its outputs stay float32.

    Args:
        base: The base graph.
        path: The converted graph.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(base), keep_io_types=True), path)


def to_int8(base: Path, path: Path, images: np.ndarray, target: Target, float_depthwise: bool = False) -> None:
    """Convert the base graph to int8 convolutions (QDQ, a scale for each output channel).

    x86: uint8 activations, int8 weights, for CPUs with VNNI. x86-avx2: the same in 7 bits, which older CPUs add up without
    overflow. arm: int8 throughout, symmetric, which TensorRT takes too. Of several ways to choose the ranges (the extremes, or
    nearly all values), the one whose logits are nearest to float32's on these images is kept. Linear layers stay in float32.
    Behind the pooling of a convolutional network they cost no time, and in int8 they would cost rare classes accuracy. Of a
    transformer they are nearly all weights; `float_layers` says how many.

    Args:
        base: The base graph.
        path: The converted graph.
        images: uint8 (N, S, S, 3), for calibration.
        target: The CPU that it is for.
        float_depthwise: Whether depthwise convolutions stay in float32, too: they have few weights, and each channel's range
            is its own, so that they lose most.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(base), str(prepared), skip_symbolic_shape=True)
    kept = depthwise(prepared) if float_depthwise else []
    expected = _logits(base, images)
    ways = [(CalibrationMethod.MinMax, {}), *((CalibrationMethod.Percentile, {"CalibPercentile": p}) for p in (99.99, 99.999))]
    # The shares are counted over all activations of these images at once: keep them within a few gigabytes.
    counted = images[: max(16, _COUNTED // images[0].size)]
    nearest = np.inf
    for number, (method, options) in enumerate(ways):
        tried = path.with_suffix(f".{number}.onnx")
        _quantize(prepared, tried, counted if options else images, target, method, options, kept)
        apart = float(np.abs(_logits(tried, images) - expected).mean())
        if apart < nearest:
            nearest = apart
            tried.replace(path)


def depthwise(model: Path) -> list[str]:
    """The names of a graph's depthwise convolutions: those with as many groups as channels."""
    graph = onnx.load(model).graph
    shapes = {weights.name: weights.dims for weights in graph.initializer}
    groups = {
        node.name: (next((entry.i for entry in node.attribute if entry.name == "group"), 1), shapes.get(node.input[1], [0]))
        for node in graph.node
        if node.op_type == "Conv"
    }
    return [name for name, (count, shape) in groups.items() if count > 1 and count == shape[0]]


@dataclass(frozen=True)
class FloatLayers:
    """The layers of an int8 graph whose weights stay in float32.

    Attributes:
        convolutions: Their names.
        linear: The names of the matrix products.
        share: The share of all layers' weights that these have, from 0 to 1.
    """

    convolutions: list[str]
    linear: list[str]
    share: float


def float_layers(model: Path) -> FloatLayers:
    """Read an int8 graph: what of it has stayed in float32.

    Args:
        model: The graph.
    """
    graph = onnx.load(model).graph
    sizes = {weights.name: math.prod(weights.dims) for weights in graph.initializer}
    converted = {node.output[0]: sizes.get(node.input[0], 0) for node in graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, list[str]] = {"Conv": [], "MatMul": [], "Gemm": []}
    kept = total = 0
    for node in graph.node:
        if node.op_type not in found:
            continue
        in_float = sum(sizes.get(name, 0) for name in node.input[:2])  # the third is a bias
        total += in_float + sum(converted.get(name, 0) for name in node.input[:2])
        if in_float:
            kept += in_float
            found[node.op_type].append(node.name)
    return FloatLayers(found["Conv"], [*found["MatMul"], *found["Gemm"]], kept / total if total else 0.0)


def _quantize(
    model: Path, path: Path, images: np.ndarray, target: Target, method: Any, options: dict[str, Any], kept: list[str]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    whole = np.resize(images, (-(-len(images) // 16) * 16, *images.shape[1:]))  # from the start again where a batch is not full
    batches = iter(whole.reshape(-1, 16, *images.shape[1:]))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {IMAGES: batch}

    symmetric = target == "arm"
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its steps
        quantize_static(
            str(model),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add", "Relu", "MaxPool"],
            nodes_to_exclude=kept,
            per_channel=True,
            reduce_range=target == "x86-avx2",
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, **options},
        )


def _logits(model: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    parts = [session.run([_RAW], {IMAGES: images[i : i + 64]})[0] for i in range(0, len(images), 64)]
    return np.concatenate(parts)
