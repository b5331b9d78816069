"""libturbojpeg's decoder, to be called from compiled code: the library that FFCV itself is built with.

Declared by name, not by address, so that compiled code which calls it can be cached between runs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import weakref

import llvmlite.binding
import numpy as np
from numba import types

from pipelines.common.errors import UserError

RGB = 0  # TJPF_RGB
YCBCR = 1  # TJCS_YCbCr


def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0"
    try:
        library = ctypes.CDLL(name)
        llvmlite.binding.load_library_permanently(library._name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"libturbojpeg cannot be loaded ({error}); install libturbojpeg0, or set loader.kind: torch") from error
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    return library


_tj = _library()

_address, _long, _int = types.intp, types.uintp, types.int32
# (decoder, file, its size, then where to write width, height, chroma subsampling and colour space: int32 each) -> 0 or -1
read_header = types.ExternalFunction("tjDecompressHeader3", _int(_address, _address, _long, *[_address] * 4))
# (decoder, file, its size, out, width, bytes a row or 0, height, pixel format, flags) -> 0 or -1
decode_rgb = types.ExternalFunction("tjDecompress2", _int(_address, _address, _long, _address, _int, _int, _int, _int, _int))
# (decoder, file, its size, three addresses, width, bytes a row of each or 0, height, flags) -> 0 or -1; scaled to fit the size
decode_planes = types.ExternalFunction(
    "tjDecompressToYUVPlanes", _int(_address, _address, _long, _address, _int, _address, _int, _int)
)


class Decoders:
    """A decoder a thread: `handles`, int64 (threads,), as the functions above take them, valid while this object lives."""

    def __init__(self, threads: int) -> None:
        self.handles = np.array([_tj.tjInitDecompress() or 0 for _ in range(threads)], dtype=np.int64)
        if not self.handles.all():
            raise MemoryError("libturbojpeg has no memory for another decoder")
        weakref.finalize(self, _destroy, self.handles.tolist())


def _destroy(handles: list[int]) -> None:
    for handle in handles:
        _tj.tjDestroy(handle)
