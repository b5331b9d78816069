"""The OpenAPI document of the service."""

from __future__ import annotations

from typing import Any

from serve.settings import ReplicaConfig
from serve.v1 import MAX_LOGITS

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
                                "group": {"type": "string", "enum": ["many", "medium", "few"]},
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


def openapi(config: ReplicaConfig) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    options = [
        _query("model", {"type": "string"}, "which model, where there are several"),
        _query("top_k", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}, "classes an image"),
        _query(
            "tail_shift", {"type": "number", "default": 0}, "logits - tail_shift * log prior: more of it favours rare classes"
        ),
        _query("logits", {"type": "boolean", "default": False}, f"also the logits of all classes; {MAX_LOGITS:,} at most"),
    ]
    files = {"type": "string", "format": "binary"}
    formats = {f"image/{name.lower()}": {"schema": files} for name in config.formats}
    texts = {"type": "string", "contentEncoding": "base64"}
    fields = {"model": {"type": "string"}, "top_k": {"type": "integer"}, "tail_shift": {"type": "number"}}
    fields["logits"] = {"type": "boolean"}
    body = {
        **formats,
        "application/octet-stream": {"schema": files},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "array", "items": files}, **fields}}
        },
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"image": texts, "images": {"type": "array", "items": texts}, **fields},
            }
        },
    }
    model = [_path("name", "a model's name")]
    paths = {
        "/v1/predict": {"post": _operation("Labels of images", _PREDICTION, options, {"required": True, "content": body})},
        "/v1/models": {"get": _operation("Models, their accuracy and files")},
        "/v1/models/{name}/{file}": {
            "get": _operation(
                "A model for the edge: fp32.onnx, fp16.onnx, int8.onnx, manifest.json; ETag, Range",
                None,
                [*model, _path("file", "PRECISION.onnx")],
            )
        },
        "/v2": {"get": _operation("Open Inference Protocol: the server")},
        "/v2/health/live": {"get": _operation("The process answers")},
        "/v2/health/ready": {"get": _operation("A model has answered a real inference")},
        "/v2/models/{name}": {"get": _operation("Open Inference Protocol: a model's tensors", None, model)},
        "/v2/models/{name}/ready": {"get": _operation("Open Inference Protocol: a model is ready", None, model)},
        "/v2/models/{name}/infer": {
            "post": _operation("Open Inference Protocol: inference, JSON or binary tensors", None, model)
        },
        "/metrics": {"get": _operation("Prometheus")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "cibl-ray", "version": "1", "description": f"Bodies of {config.max_bytes:,} bytes at most."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _query(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _path(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": text}


def _operation(
    summary: str, answer: dict[str, Any] | None = None, parameters: list[dict[str, Any]] | None = None, body: Any = None
) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": answer}}} if answer else {}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "OK", **content}, "default": {"description": "an error", **error}},
    }
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = body
    return operation
