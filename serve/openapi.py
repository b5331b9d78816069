"""The OpenAPI document of the service."""

from __future__ import annotations

from typing import Any

from cibl_ray.bundle.card import MAX_SHIFT
from serve.settings import ReplicaConfig
from serve.v2 import MAX_NUMBERS

_ERROR = {
    "type": "object",
    "required": ["error", "code", "request_id"],
    "properties": {
        "error": {"type": "string", "description": "what is wrong, for people"},
        "code": {"type": "string", "description": "the same in a word, for programs"},
        "request_id": {"type": "string"},
    },
}
_PREDICTION = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "precision": {"type": "string"},
        "sha256": {"type": "string", "description": "of the ONNX file that answered"},
        "request_id": {"type": "string"},
        "predictions": {
            "type": "array",
            "description": "one an image",
            "items": {
                "type": "object",
                "properties": {
                    "top": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "label": {"type": "string"},
                                "probability": {"type": "number"},
                                "group": {
                                    "type": "string",
                                    "enum": ["many", "medium", "few"],
                                    "description": "by training images",
                                },
                                "index": {"type": "integer"},
                            },
                        },
                    },
                    "logits": {
                        "type": "array",
                        "items": {"type": "number"},
                        "description": "of all classes, if asked for: probabilities are their softmax",
                    },
                },
            },
        },
    },
}


_LIST = {"type": "array", "items": {"type": "object"}}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}
_MODELS = {"type": "object", "required": ["models"], "properties": {"models": _LIST}}
_HEALTHY = {"type": "object"}
_READY = {"type": "object", "required": ["ready"], "properties": {"ready": {"type": "boolean"}, "name": {"type": "string"}}}
_METADATA = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {
        "name": {"type": "string"},
        "versions": {"type": "array", "items": {"type": "string"}},
        "platform": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_INFERENCE = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "minItems": 1, "items": _TENSOR},
        "outputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
        "parameters": {"type": "object"},
    },
}
_RESULT = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_STATISTICS = {"type": "object", "required": ["model_stats"], "properties": {"model_stats": _LIST}}


def openapi(config: ReplicaConfig, keys: bool = False) -> dict[str, Any]:
    """Describe the service.

    Args:
        config: The limits, and the path prefix.
        keys: Whether API keys are asked for.

    Returns:
        The document, OpenAPI 3.1.
    """
    top_k = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}
    shift = {"type": "number", "minimum": -MAX_SHIFT, "maximum": MAX_SHIFT, "default": 0}
    named = {"type": "string", "maxLength": 128}
    precision: dict[str, Any] = {"type": "string", "enum": list(config.precisions), "default": config.precision}
    options = [
        _query("model", named, "which model, where there are several"),
        _query("top_k", top_k, "classes of each image"),
        _query("tail_shift", shift, "logits - tail_shift * log prior: more of it favours rare classes"),
        _query("precision", precision, "which of the precisions that the service has"),
        _query("logits", {"type": "boolean", "default": False}, f"also the logits of all classes; {MAX_NUMBERS:,} at most"),
    ]
    files = {"type": "string", "format": "binary"}
    formats = {f"image/{name.lower()}": {"schema": files} for name in config.formats}
    texts = {"type": "string", "contentEncoding": "base64"}
    fields: dict[str, Any] = {
        "model": named,
        "top_k": top_k,
        "tail_shift": shift,
        "logits": {"type": "boolean", "default": False},
    }
    fields["precision"] = precision
    most = config.max_images
    images = {"type": "array", "items": texts, "minItems": 1, "maxItems": most}
    one = {"type": "object", "additionalProperties": False}
    body = {
        **formats,
        "application/octet-stream": {"schema": files},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "items": files, "minItems": 1, "maxItems": most}, **fields},
            }
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {**one, "required": ["image"], "properties": {"image": texts, **fields}},
                    {**one, "required": ["images"], "properties": {"images": images, **fields}},
                ]
            }
        },
    }
    infer = {
        "application/json": {"schema": _INFERENCE},
        "application/octet-stream": {"schema": {**files, "description": "JSON, then binary tensors"}},
    }
    model = [_path("name", "a model's name")]
    version = [*model, _path("version", "the one that the model has")]
    binary = {"application/octet-stream": {"schema": files}}
    paths: dict[str, Any] = {
        "/v1/predict": {"post": _operation("Labels of images", _PREDICTION, options, body)},
        "/v1/models": {"get": _operation("Models, their accuracy and files", _MODELS)},
        "/v1/models/{name}/{file}": {
            "get": _operation(
                "A model for the edge: fp32.onnx, fp16.onnx, int8.onnx, manifest.json; ETag, Range",
                {"type": "object"},
                [*model, _path("file", "PRECISION.onnx or manifest.json")],
                also=binary,
                more=("206", "304"),
            )
        },
        "/v2": {"get": _operation("Open Inference Protocol: the server", {"type": "object"})},
        "/v2/health/live": {"get": _operation("The process answers", _HEALTHY)},
        "/v2/health/ready": {"get": _operation("A model has answered a real inference", _READY)},
        "/v2/repository/index": {"post": _operation("Triton's list of models", _LIST)},
        "/v2/models/stats": {"get": _operation("Triton's statistics of all models, of one replica", _STATISTICS)},
        "/metrics": {"get": _operation("For Prometheus", None, also={"text/plain": {"schema": {"type": "string"}}})},
        "/openapi.json": {"get": _operation("This document", {"type": "object"})},
        "/docs": {"get": _operation("This document as a page", None, also={"text/html": {"schema": {"type": "string"}}})},
    }
    for at, parameters in (("/v2/models/{name}", model), ("/v2/models/{name}/versions/{version}", version)):
        paths |= {
            at: {"get": _operation("Open Inference Protocol: a model's tensors", _METADATA, parameters)},
            f"{at}/ready": {"get": _operation("Open Inference Protocol: a model is ready", _READY, parameters)},
            f"{at}/config": {"get": _operation("Triton's configuration of a model", {"type": "object"}, parameters)},
            f"{at}/stats": {"get": _operation("Triton's statistics of a model, of one replica", _STATISTICS, parameters)},
            f"{at}/infer": {
                "post": _operation(
                    "Open Inference Protocol: inference, JSON or binary tensors", _RESULT, parameters, infer, binary
                )
            },
        }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "cibl-ray", "version": "1", "description": f"A body may have {config.max_bytes:,} bytes."},
        "servers": [{"url": config.path_prefix or "/"}],
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs"):
        paths[path]["get"]["security"] = []
    if keys:
        document["components"]["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        document["security"] = [{"key": []}, {"bearer": []}]
    return document


def _query(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _path(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": text}


def _operation(
    summary: str,
    answer: dict[str, Any] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
    also: dict[str, Any] | None = None,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """answer: schema of the JSON. also: content types of other answers. more: statuses of success beside 200."""
    content = {**({"application/json": {"schema": answer}} if answer else {}), **(also or {})}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    responses |= {status: {"description": "a part" if status == "206" else "not modified"} for status in more}
    if "206" in more:
        responses["206"]["content"] = content
    responses["default"] = {"description": "an error", **error}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": body}
    return operation
