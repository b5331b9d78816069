"""Warnings that image decoders give: one line for all of them, with an image's name, instead of paths of installed packages."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL

_PILLOW = str(Path(PIL.__file__).parent)


class Warned:
    """The images that a decoder warned of. Threads tell with `begin` which image they are at."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._first: dict[str, str] = {}

    def begin(self, image: str) -> None:
        """The calling thread decodes this image from now on."""
        self._here.image = image

    def note(self, message: str) -> None:
        """Keep a warning of the calling thread's image."""
        with self._lock:
            self._first.setdefault(getattr(self._here, "image", "an image"), message)

    def text(self) -> str:
        """A count and one name; empty where there was no warning."""
        if not self._first:
            return ""
        image, message = next(iter(self._first.items()))
        return f"{len(self._first):,} images were read with a warning of the decoder, such as {image}: {message}"


@contextmanager
def collected_warnings() -> Iterator[Warned]:
    """Collect the warnings of Pillow for as long as the context lasts; all others are shown as before."""
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
