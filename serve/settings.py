"""What a service may be told. Everything from outside is capped here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipelines.common.errors import UserError
from serve.cors import ORIGIN

KEYS = "CIBL_RAY_API_KEYS"  # in the environment, separated by commas
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]


class ReplicaConfig(BaseModel):
    """What a replica keeps to for all its life."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    threads: int | None = Field(default=1, ge=1, le=512, description="of onnxruntime, in each replica; null: all cores")
    max_batch: int = Field(default=32, ge=1, le=4096, description="images of one call of onnxruntime")
    max_queue: int = Field(default=256, ge=1, le=100_000, description="requests waiting in a replica; more get 503")
    max_bytes: int = Field(default=16 << 20, ge=1024, le=1 << 30, description="of a request's body")
    max_held_bytes: int = Field(
        default=256 << 20, ge=1024, description="of all bodies and decoded images in a replica; more get 503"
    )
    max_images: int = Field(default=64, ge=1, le=4096, description="of a request")
    max_pixels: int = Field(default=40_000_000, ge=1024, description="that an image's header may announce")
    max_request_pixels: int = Field(default=160_000_000, ge=1024, description="that its images may announce together")
    formats: tuple[Format, ...] = ("JPEG", "PNG", "WEBP")
    body_seconds: float = Field(default=10, gt=0, description="in which a request's body must have arrived")
    keys_file: Path | None = Field(default=None, description="API keys, one a line")
    access_log: Path | None = Field(default=None, description="folder for JSON lines, one file a replica")
    watch_seconds: float = Field(default=2, gt=0, description="between looks for a new version in a bundle's place")

    cors: tuple[str, ...] = Field(
        default=(), max_length=64, description="origins whose pages may call the service, such as https://example.org; * is all"
    )

    @field_validator("cors")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; give scheme, host and port, as in https://example.org, or *")
        return tuple(origin.lower() for origin in value)


class ServiceConfig(ReplicaConfig):
    """One service. In Ray Serve's configuration it is the application's `args`."""

    bundles: tuple[Path, ...] = Field(min_length=1, max_length=64, description="bundle folders, one a model")
    replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int | None = Field(default=None, ge=1, le=1024, description="autoscale up to this many; null: no autoscaling")


def check(args: dict[str, Any]) -> ServiceConfig:
    """`args` as a configuration, its keys read too. Raises UserError."""
    try:
        config = ServiceConfig.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}") from error
    if config.max_held_bytes < config.max_bytes:
        raise UserError(f"max_held_bytes = {config.max_held_bytes}: less than one body may have; give max_bytes or more")
    read_keys(config)
    return config


def read_keys(config: ReplicaConfig) -> list[bytes]:
    """SHA-256 of each API key. Raises UserError where a file of keys is named that has none: nothing is open by mistake."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    if KEYS in os.environ and not keys:
        raise UserError(f"{KEYS} is set, but holds no key; unset it, or give keys separated by commas")
    if config.keys_file is not None:
        try:
            lines = [line.strip() for line in config.keys_file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"keys_file {str(config.keys_file)!r} cannot be read: {error}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"keys_file {str(config.keys_file)!r} holds no key; write one a line")
        keys += found
    return [hashlib.sha256(key.encode()).digest() for key in keys]
