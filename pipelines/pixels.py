"""One image from its bytes to the network's input, by Pillow and numpy alone.

Evaluation, the server and the edge client all go through `EvalRule`, so that what was measured is what is served.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pipelines import jpeg, png
from pipelines.exif import orientation, turned
from pipelines.formats import readable_formats

MAX_PIXELS = 60_000_000  # of an image, by default: training, evaluation, service and edge read the same images
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000; the 43rd byte has the bits of a value
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_LONGEST = 65535  # pixels of a side, as JPEG has
_PASSES = 25  # over as many pixels as are allowed; progressive files have some 10 to 20
# Pillow walks through a file's parts in Python, a microsecond for each read: of a segment four, of a chunk three, of a byte
# that belongs to none one. 512 segments are more metadata than any camera writes; pictures come in chunks of kilobytes.
_HEADER_READS = 2048
_BYTES_A_READ = 256
_SEGMENTS = 2048  # of a JPEG: a scan of a progressive one has some tables
_PROFILES = 4  # of colour in a PNG, which may have one: each is inflated, to a megabyte from a thousand bytes
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files
_DARK = 1 << 12  # 16-bit values that stay below it would all be black: they have 12 or 10 bits, which the file does not record
# What a file says of its values, in `Image.info`.
_BITS, _SIGNIFICANT, _WHITE, _INVERTED = "cibl_ray_bits", "cibl_ray_significant", "cibl_ray_white", "cibl_ray_inverted"


class BadImageError(ValueError):
    """The bytes are not an image, or only a part of one, or beyond a limit.

    Args:
        message: What is wrong, and what can be done to the file.
        setting: A setting of a configuration by which the image would be read, for commands that have one.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


@contextmanager
def damage_told(data: bytes | np.ndarray) -> Iterator[None]:
    """Raise as a BadImageError what is raised within: damaged files fail in many ways, deep in their decoders.

    Args:
        data: The file, or its pixels.
    """
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(f"{len(data)} bytes, {type(error).__name__}: {error}") from error


def decode(
    data: bytes | np.ndarray,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    max_scans: int | None = 100,
) -> Image.Image:
    """Decode an image file.

    Args:
        data: An encoded file, or uint8 pixels (H, W, 3).
        formats: Pillow's names of the formats to try; None: those of `pipelines.formats`, and HEIC.
        max_pixels: What the header may announce; checked before anything is decoded. None: nothing is limited.
        max_scans: Of a JPEG, fewer where it is large; the number of a file's other parts is limited, too. None: only the
            pixels are, as for one's own files. Their metadata are stepped over where Pillow refuses the size of these.

    Returns:
        The image in its own mode.

    Raises:
        BadImageError: The data are damaged, or beyond a limit.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        return _loaded(data, formats, max_pixels, max_scans)
    except BadImageError:
        if (max_pixels is not None and max_scans is not None) or not data.startswith(_PNG):
            raise
        smaller = png.without_large_metadata(data)
        if len(smaller) == len(data):
            raise
        return _loaded(smaller, formats, max_pixels, max_scans)


def _loaded(data: bytes, formats: tuple[str, ...] | None, max_pixels: int | None, max_scans: int | None) -> Image.Image:
    image, _ = opened(data, formats, max_pixels, max_scans)
    try:
        image.load()
        if data.startswith(_PNG) and image.mode == "RGB" and image.info[_BITS] == 16 and "transparency" in image.info:
            image = _without_key_colour(image, data)
    except BadImageError:
        raise
    except _BROKEN as error:
        raise BadImageError(f"{len(data)} bytes, {error}") from error
    return image


def opened(
    data: bytes,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    max_scans: int | None = 100,
) -> tuple[Image.Image, int]:
    """Open an image file as `decode` does, but read and check its header alone.

    Args:
        data: An encoded file.
        formats: As for `decode`.
        max_pixels: As for `decode`.
        max_scans: As for `decode`.

    Returns:
        The image, and how many passes over it a decoder makes (more than 1 only for progressive JPEGs).

    Raises:
        BadImageError: The header is damaged, or announces what is beyond a limit.
    """
    strict = max_pixels is not None and max_scans is not None
    file = _Counted(data) if strict else io.BytesIO(data)
    scans = 1
    try:
        if strict and data.startswith(_PNG) and data.count(b"iCCP") > _PROFILES:
            raise BadImageError(f"{len(data)} bytes with more than {_PROFILES} colour profiles; save it again without them")
        if formats is None:
            formats = readable_formats()
            if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
                _register_heif()
                formats += ("HEIF",)
        with _own_limit():
            image = Image.open(file, formats=formats)
        if max_pixels is not None:
            size = f"{image.width}x{image.height} pixels"
            # A side of millions would make a resize cost gigabytes, however short the other one is.
            if max(image.size) > _LONGEST:
                raise BadImageError(f"{size}, {_LONGEST:,} a side at most")
            if image.width * image.height > max_pixels:
                raise BadImageError(f"{size}, {max_pixels:,} at most", f"data.max_pixels: {image.width * image.height}")
            if max_scans is not None:
                scans = _check_scans(image, data, max_pixels, max_scans)
        if isinstance(file, _Counted):
            file.left = _HEADER_READS + len(data) // _BYTES_A_READ
        _note_depth(image, data)
    except UnidentifiedImageError as error:
        raise BadImageError(f"{len(data)} bytes, not of {', '.join(formats or ())}") from error
    except BadImageError:
        raise
    except _BROKEN as error:
        raise BadImageError(f"{len(data)} bytes, {error}") from error
    return image, scans


def _register_heif() -> None:
    """Let Pillow read HEIC. Raises BadImageError where the package for it is missing."""
    try:
        import pillow_heif
    except ImportError as error:
        raise BadImageError("HEIC, which needs: pip install 'cibl-ray[heic]'") from error
    pillow_heif.register_heif_opener()


_limit_lock = threading.Lock()
_limit_users = 0
_pillows_limit: int | None = None


@contextmanager
def _own_limit() -> Iterator[None]:
    """Without Pillow's own limit of pixels, which warns in one range and raises in another: ours is `max_pixels`."""
    global _limit_users, _pillows_limit
    with _limit_lock:
        if _limit_users == 0:
            _pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if _limit_users == 0:
                Image.MAX_IMAGE_PIXELS = _pillows_limit


class _Counted(io.BytesIO):
    """A file that refuses to be read in too many parts."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = _HEADER_READS

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadImageError(
                f"{self.getbuffer().nbytes} bytes in too many parts (metadata, strips); save it again with fewer"
            )
        return super().read(size)


def _check_scans(image: Image.Image, data: bytes, max_pixels: int, max_scans: int) -> int:
    """A JPEG's scans, else 1. Raises BadImageError where decoding would cost too much."""
    if not data.startswith(_JPEG):
        return 1
    # A decoder goes over the whole picture for each scan, even for one of a few bytes.
    most = min(max_scans, _PASSES * max_pixels // (image.width * image.height))
    scans = jpeg.scans(data, most + 1, _SEGMENTS)
    if scans is None:
        raise BadImageError(f"{len(data)} bytes in more than {_SEGMENTS} segments; save it again without its metadata")
    if scans > most:
        raise BadImageError(f"{image.width}x{image.height} pixels in more than {most} scans; save it with fewer")
    return max(1, scans)


def _note_depth(image: ImageFile.ImageFile, data: bytes) -> None:
    """Keep in `image.info` what the file says of its values: Pillow's mode has only 8, 16 or 32 bits."""
    if data.startswith(_PNG):
        image.info[_BITS], image.info[_SIGNIFICANT] = png.depth(data)
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        image.info[_BITS] = _first(tags.get(258, 1))
        image.info[_WHITE] = _first(tags.get(281, 0))
        image.info[_INVERTED] = _first(tags.get(262, 1)) == 0 and image.info[_BITS] > 8  # Pillow inverts fewer bits
    elif image.format == "PPM" and image.mode == "I":
        args = image.tile[0].args
        image.info[_WHITE] = args[1] if isinstance(args, tuple) else 65535  # the header's maximum
    elif image.format == "JPEG2000" and image.mode == "I;16":
        image.info[_BITS] = (data[data.find(_CODESTREAM) + 42] & 127) + 1


def _first(value: object) -> int:
    """A tag's first number; 0 where it has none."""
    first = value[0] if isinstance(value, tuple) and value else value
    return int(first) if isinstance(first, (int, float)) else 0


def _without_key_colour(image: Image.Image, data: bytes) -> Image.Image:
    """A PNG of 16 bits a colour, one of which is transparent: only the pixels whose 16 bits are all equal to it are."""
    low = Image.open(io.BytesIO(data), formats=("PNG",))
    low.tile = [part._replace(args="RGB;16L") for part in low.tile]  # the lower bytes
    low.load()
    key = np.array(image.info.pop("transparency"))
    clear = ((np.asarray(image) == key >> 8) & (np.asarray(low) == key & 255)).all(-1)
    image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return image


def to_rgb(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """An image as a viewer shows it: turned by its EXIF orientation, on white, grey of any depth as 8 bits, CMYK converted.

    Args:
        image: An image of any mode.
        window: Of grey with more than 8 bits, the file's values that become black and white. None: as the file says.

    Returns:
        The image in mode RGB.

    Raises:
        BadImageError: Grey values of a depth that neither the file nor `window` tells.
    """
    image.load()  # a PNG's EXIF data may stand after its pixels
    turn = orientation(image)
    _refuse_dark_colours(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey8(image, window)
    if image.has_transparency_data:
        if image.mode == "La":  # from which Pillow converts to nothing else
            image = image.convert("LA")
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return turned(image if image.mode == "RGB" else image.convert("RGB"), turn)


def _grey8(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    """Grey of 12, 16 or 32 bits, or of floats, as 8 bits: of n bits, the upper 8."""
    values = np.asarray(image)
    if window is not None:
        low, high = window
        values = _as_in_file(image, values)
        if values.dtype.kind == "f":
            scaled_values = np.nan_to_num((values - low) * (255 / (high - low))).round()
        else:
            scaled_values = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
        grey = scaled_values.clip(0, 255).astype(np.uint8)
    else:
        grey = (values.astype(np.int64) >> (_grey_bits(image, values) - 8)).astype(np.uint8)
    if image.info.get(_INVERTED):
        grey = 255 - grey
    clear = image.info.get("transparency")  # a value, of a PNG
    return Image.fromarray(grey if clear is None else np.where(values == clear, 255, grey).astype(np.uint8))


def _as_in_file(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """The values before Pillow scaled them to 16 bits, which it does for PGM and JPEG 2000 alone."""
    if image.format == "PPM" and _WHITE in image.info:
        return np.rint(values.astype(np.float64) * image.info[_WHITE] / 65535).astype(np.int32)
    if image.format == "JPEG2000" and _BITS in image.info:
        return values >> max(0, 16 - image.info[_BITS])
    return values


def _grey_bits(image: Image.Image, values: np.ndarray) -> int:
    """How many bits the values of a grey image have. Raises BadImageError where nothing tells."""
    setting, hint = "data.window: [BLACK, WHITE]", "; save it with 8 bits"
    if values.dtype.kind == "f":
        raise BadImageError("floating-point grey" + hint, setting)
    low, high = int(values.min()), int(values.max())
    kind = "32-bit" if image.mode == "I" else "16-bit"
    if low < 0 or high > 65535:
        raise BadImageError(f"{kind} grey with values from {low} to {high}{hint}", setting)
    if image.format in ("PNG", "TIFF"):
        bits, significant, white = (int(image.info.get(name, 0)) for name in (_BITS, _SIGNIFICANT, _WHITE))
        if 8 < bits < 16:
            return bits
        if 8 <= significant < 16 and high < 1 << significant:
            return significant
        if white > 255 and (white + 1).bit_count() == 1 and high <= white:  # all ones: no mere statistics
            return white.bit_length()
        if 0 < high < _DARK and significant != 16:
            text = f"{kind} grey with values from {low} to {high}, of a depth that the file does not tell{hint}"
            raise BadImageError(text, setting)
    return 16  # other formats scale to it, and so does Pillow


def _refuse_dark_colours(image: Image.Image) -> None:
    """Raise BadImageError for colours of 16 bits that use only the lower 12: Pillow keeps their upper 8, which are black."""
    if image.mode not in ("RGB", "RGBA", "LA") or image.info.get(_BITS) != 16 or image.info.get(_SIGNIFICANT) == 16:
        return
    highest = max(image.getchannel(band).getextrema()[1] for band in image.getbands() if band != "A")
    if isinstance(highest, int) and 0 < highest < _DARK >> 8:
        raise BadImageError(f"16-bit colours with values below {_DARK:,}, of an unknown depth; save it with 8 bits")


def stored_size(width: int, height: int, square: int | None, max_side: int | None) -> tuple[int, int]:
    """Compute the size that an image is stored with.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        square: Both sides of the result; None: the shape stays.
        max_side: The longest side of the result, to which larger images are scaled down; None: the size stays.

    Returns:
        Width and height, pixels.
    """
    if square is not None:
        return square, square
    scale = 1.0 if max_side is None else min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB image at another width and height (bicubic, antialiased), or itself where it has them."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class EvalRule:
    """What evaluation shows of an image: torchvision's Resize and CenterCrop (256 and 224: ratio .875).

    The image is scaled as it would be stored, then resized so that the shorter side has `side` pixels (antialiased), then cut
    to the central square.

    Attributes:
        size: Width and height of the result, pixels.
        ratio: `size` over `side`.
        square: As in `stored_size`.
        max_side: As in `stored_size`.
        window: As in `to_rgb`.
        interpolation: Of the resize to `side`: "bilinear" or "bicubic".
    """

    size: int
    ratio: float = 1.0
    square: int | None = None
    max_side: int | None = None
    window: tuple[float, float] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.window is not None:  # a list, where it comes from a file
            low, high = self.window
            object.__setattr__(self, "window", (low, high))

    @property
    def side(self) -> int:
        """Pixels of the shorter side before the central square is taken."""
        return round(self.size / self.ratio)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (size, size, 3) of an image of any mode. An image that is stored scaled gives what its original gives."""
        image = to_rgb(image, self.window)
        image = scaled(image, stored_size(*image.size, self.square, self.max_side))
        width, height = image.size
        shorter = min(width, height)
        wide, high = int(self.side * width / shorter), int(self.side * height / shorter)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        if (wide, high) == (width, height):
            return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        # Only what remains of it is resized: the box in the original's coordinates.
        x, y = width / wide, height / high
        box = (left * x, top * y, min(width, (left + self.size) * x), min(height, (top + self.size) * y))
        return np.asarray(image.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()], box=box))
