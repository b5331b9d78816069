"""The settings of a service. Everything that comes from outside is limited here."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipelines.common.errors import UserError
from pipelines.pixels import MAX_PIXELS
from serve.cors import ORIGIN

KEYS = "CIBL_RAY_API_KEYS"  # in the environment, separated by commas
Precision = Literal["fp32", "fp16", "int8"]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]
Seconds = Annotated[float, Field(le=86400, allow_inf_nan=False)]  # HAProxy and asyncio cannot wait for ever


class ReplicaConfig(BaseModel):
    """The settings that a replica keeps for all its life."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision = Field(default="fp32", description="which of the bundle's models answers")
    more_precisions: tuple[Precision, ...] = Field(
        default=(), max_length=2, description="others that are loaded, too: a request may ask for them"
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(default="auto", description="provider of onnxruntime")
    threads: int | None = Field(default=1, ge=1, le=512, description="threads of onnxruntime in each replica")
    max_batch: int = Field(default=32, ge=1, le=4096, description="images in one call of onnxruntime")
    max_queue: int = Field(default=256, ge=1, le=100_000, description="requests that wait in a replica; more get 503")
    max_bytes: int = Field(default=16 << 20, ge=1024, le=1 << 30, description="bytes of a request's body, also decompressed")
    max_held_bytes: int = Field(
        default=256 << 20,
        ge=1024,
        description="bytes of all bodies, decoded images and unsent answers in a replica; more get 503",
    )
    max_images: int = Field(default=64, ge=1, le=4096, description="images of a request")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1024, description="pixels of an image")
    max_request_pixels: int = Field(default=160_000_000, ge=1024, description="pixels of all images of a request")
    max_waiting_pixels: int = Field(
        default=800_000_000,  # 64 photographs of 12 million
        ge=1024,
        description="pixels of images that wait in a replica to be decoded, large ones counted apart; more get 503",
    )
    formats: tuple[Format, ...] = Field(default=("JPEG", "PNG", "WEBP"), min_length=1, description="image formats")
    body_seconds: Seconds = Field(default=10, gt=0, description="seconds in which a request's body must arrive")
    keys_file: Path | None = Field(default=None, description="file of API keys, one a line; read again when it changes")
    access_log: Path | None = Field(default=None, description="folder for JSON lines, one file for each replica")
    watch_seconds: Seconds = Field(default=2, gt=0, description="seconds between two looks for a new version of a bundle")
    path_prefix: str = Field(default="", description="what stands before every path, such as /models")
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        description="addresses or networks of proxies: their X-Forwarded-For names the client; each may open all connections",
    )

    private_ports: bool = Field(
        default=True,
        description="keep the port that Ray Serve's replicas open on loopback, by wrapping gRPC's add_insecure_port in them",
    )
    cors: tuple[str, ...] = Field(
        default=(), max_length=64, description="origins whose pages may call the service, such as https://example.org; * is all"
    )

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All that are loaded; the first answers where a request names none."""
        return tuple(dict.fromkeys((self.precision, *self.more_precisions)))

    @property
    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """`trusted_proxies`, parsed."""
        return tuple(ipaddress.ip_network(text) for text in self.trusted_proxies)

    @field_validator("path_prefix")
    @classmethod
    def _is_prefix(cls, value: str) -> str:
        if value in ("", "/"):
            return ""
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", value):
            raise ValueError("give a path such as /models, of letters, digits, '.', '_', '~' and '-'")
        return value.rstrip("/")

    @field_validator("cors")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; give scheme, host and port, as in https://example.org, or *")
        return tuple(origin.lower() for origin in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(text)) for text in value)  # a ValueError that says what is wrong


class ServiceConfig(ReplicaConfig):
    """The settings of one service. In Ray Serve's configuration they are the application's `args`.

    The limits on connections, TLS and `private_ports` belong to `python -m serve`. `serve deploy` refuses them, because Ray
    Serve's own proxy would not apply them.
    """

    bundles: tuple[Path, ...] = Field(min_length=1, max_length=64, description="bundle folders, one for each model")
    replicas: int = Field(default=1, ge=1, le=1024, description="processes that answer")
    max_replicas: int | None = Field(default=None, ge=1, le=1024, description="scale with the load up to this many")
    max_connections: int = Field(default=4096, ge=1, le=100_000, description="open connections")
    max_connections_per_address: int = Field(
        default=256, ge=0, le=100_000, description="open connections of one client address; 0: no limit"
    )
    idle_seconds: Seconds = Field(
        default=10, ge=1, description="seconds until a connection is closed that sends no request, or half of a request's head"
    )
    tls_certificate: Path | None = Field(default=None, description="PEM file with the certificate chain; the port speaks HTTPS")
    tls_key: Path | None = Field(default=None, description="PEM file with the certificate's private key")


COMMAND_ONLY = ("max_connections", "max_connections_per_address", "idle_seconds", "tls_certificate", "tls_key", "private_ports")


def check(args: dict[str, Any]) -> ServiceConfig:
    """Validate a service's settings, and read the files that they name.

    Args:
        args: Field names of `ServiceConfig` with their values.

    Returns:
        The settings.

    Raises:
        UserError: A value is out of range, two values contradict each other, or a file cannot be used.
    """
    try:
        config = ServiceConfig.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {message}") from error
    if config.max_held_bytes < config.max_bytes:
        raise UserError(f"max_held_bytes = {config.max_held_bytes}: less than one body may have; give max_bytes or more")
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise UserError("tls_certificate and tls_key belong together; give both files")
    for name, path in (("tls_certificate", config.tls_certificate), ("tls_key", config.tls_key)):
        if path is not None:
            try:
                path.read_bytes()
            except OSError as error:
                raise UserError(f"{name} = {str(path)!r}: {error.strerror}; give a readable PEM file") from error
    read_keys(config)
    return config


def read_keys(config: ReplicaConfig) -> list[bytes]:
    """Read the API keys from the environment and the keys file.

    Args:
        config: The settings.

    Returns:
        The SHA-256 of each key.

    Raises:
        UserError: Keys are asked for and there are none. A service is never open by mistake.
    """
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    if KEYS in os.environ and not keys:
        raise UserError(f"{KEYS} is set, but holds no key; unset it, or give keys separated by commas")
    if config.keys_file is not None:
        try:
            lines = [line.strip() for line in config.keys_file.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(
                f"keys_file {str(config.keys_file)!r} cannot be read: {reason}; give a file of keys, one a line: --keys FILE"
            ) from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"keys_file {str(config.keys_file)!r} holds no key; write one a line into it (--keys FILE)")
        keys += found
    return [hashlib.sha256(key.encode()).digest() for key in keys]
