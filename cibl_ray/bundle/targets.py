"""CPUs that int8 models are made for. Standard library alone, so that an edge device can ask too."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Target = Literal["x86", "x86-avx2", "arm"]


def this_machine() -> Target:
    """The int8 settings that suit the CPU here."""
    if platform.machine().lower() in ("aarch64", "arm64", "armv7l"):
        return "arm"
    return "x86" if "vnni" in cpu_info() else "x86-avx2"


def misfit(source: Mapping[str, Any]) -> str | None:
    """Say why an int8 model answers worse on the CPU here than on the one that it was made for.

    x86 without VNNI adds pairs of products in 16 bits, which hold only the products of 7-bit weights.

    Args:
        source: Of the model's card.

    Returns:
        The reason and the fix; None where the model fits.
    """
    int8 = source.get("int8")
    target = int8.get("target") if isinstance(int8, Mapping) else None
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    flags = cpu_info()
    if target not in ("x86", "arm") or not x86 or not flags or "vnni" in flags:
        return None
    return f"is for {target}; this CPU lacks VNNI: sums overflow, answers are worse; use fp32, or export --target x86-avx2"


def cpu_info() -> str:
    """What Linux says of the CPU, in `/proc/cpuinfo`; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
