"""Warnings of image decoders as one line with an image's name, instead of many with paths of installed packages."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL

from pipelines.common.words import plural

_PILLOW = str(Path(PIL.__file__).parent)


class Warned:
    """Warnings of the decoder by image. Each thread calls `begin` with the image that it decodes next."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._first: dict[str, str] = {}

    def begin(self, image: str) -> None:
        """Note that the calling thread now decodes `image`."""
        self._here.image = image

    def note(self, message: str) -> None:
        """Keep a warning about the calling thread's image."""
        with self._lock:
            self._first.setdefault(getattr(self._here, "image", "an image"), message)

    def text(self) -> str:
        """A count and one name; empty where there was no warning."""
        if not self._first:
            return ""
        image, message = next(iter(self._first.items()))
        return f"{plural(len(self._first), 'image', 'were')} read with a warning of the decoder, such as {image}: {message}"


@contextmanager
def collected_warnings() -> Iterator[Warned]:
    """Collect Pillow's warnings as long as the context lasts. All others are shown as before.

    Yields:
        The collected warnings.
    """
    warned = Warned()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
            if filename.startswith(_PILLOW):
                warned.note(" ".join(str(message).split()))
            else:
                shown(message, category, filename, *rest, **more)

        warnings.showwarning = show
        warnings.filterwarnings("always", module=r"PIL\.")
        yield warned
