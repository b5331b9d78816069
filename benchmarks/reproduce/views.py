"""Views of an image of 32 pixels, as the recipes of several tables have them; YAML."""

from __future__ import annotations

_CROP, _RESIZED = "cut: {kind: crop, padding: 4}", "cut: {kind: resized, scale: [0.2, 1.0]}"
PLAIN = f"{{{_CROP}}}"
STRONG = f"{{{_CROP}, augment: [{{kind: auto_augment}}, {{kind: cutout, size: 16}}]}}"
OTHER = f"{{{_RESIZED}, augment: [{{kind: color_jitter}}, {{kind: grayscale}}]}}"


def views(*each: str) -> tuple[str, str]:
    """The option that sets these views."""
    return "--data.views", f"[{', '.join(each)}]"
