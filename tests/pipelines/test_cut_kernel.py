"""The compiled cut against torchvision's antialiased resize of what Pillow decodes, on photographs."""

import ctypes
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from pipelines.config import LoaderConfig, RandomCrop, RandomResizedCrop, View
from pipelines.loaders.cuts import draw_cuts, epoch_order
from pipelines.loaders.reading import ReadPlan
from pipelines.prepare.beton import Beton, BetonWriter
from pipelines.prepare.images import Packed
from tests.conftest import needs_ffcv

pytestmark = needs_ffcv
ANY = View(cut=RandomResizedCrop(kind="resized"))
LARGE = View(cut=RandomResizedCrop(kind="resized", scale=(0.6, 1.0)))


def jpeg(image: Image.Image, subsampling: str | int = "4:2:0", **options) -> Packed:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=subsampling, **options)
    return Packed(True, *image.size, buffer.getvalue())


def write(path, images: list[Packed]) -> Beton:
    with BetonWriter(path, len(images)) as writer:
        for image in images:
            writer.append(image, 0)
        writer.finish()
    return Beton(path)


def crops(photos, count: int = 12, most: int = 427) -> list[Image.Image]:
    """Boxes of the photographs, of odd and even sides."""
    random = np.random.default_rng(1)
    found = []
    for number in range(count):
        image = Image.open(photos[number % 2]).convert("RGB")
        width, height = random.integers(101, 640), random.integers(101, most)
        left, top = random.integers(0, 640 - width), random.integers(0, 428 - height)
        found.append(image.crop((left, top, left + width, top + height)))
    return found


def differences(beton: Beton, size: int, view: View, views: int = 2, epoch: int = 0, over=torch.mean) -> np.ndarray:
    """Mean (or greatest: `over` is torch.max) absolute difference to torchvision of each view of each image, of 255."""
    from pipelines.loaders.ffcv_loader import FFCVLoader

    of = ReadPlan((view,) * views, size, len(beton), 0, "instance", drop_last=True)
    batch = next(iter(FFCVLoader(beton, of, LoaderConfig(workers=2)).epoch(epoch)))
    order = epoch_order(beton.labels, "instance", 0, epoch)
    cuts = draw_cuts(of.views, size, beton.heights[order], beton.widths[order], 0, epoch)
    found = []
    for position, row in enumerate(order):
        data = beton.image(int(row))
        pixels = data.copy() if data.ndim == 3 else np.array(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        for number in range(views):
            top, left, height, width, flip = cuts[position, number].tolist()
            expected = tv.crop(image, top, left, height, width)
            if (height, width) != (size, size):
                expected = tv.resize(expected, [size, size], antialias=True)
            expected = (tv.horizontal_flip(expected) if flip else expected).permute(1, 2, 0)
            found.append(over((expected.float() - batch.views[position, number].float()).abs()).item())
    return np.array(found)


@pytest.mark.parametrize("size", [224, 96, 33, 20])
def test_resize_is_torchvisions(photos, tmp_path, size):
    beton = write(tmp_path / "train.beton", [jpeg(image) for image in crops(photos)])
    found = np.concatenate([differences(beton, size, ANY, views=3, epoch=epoch) for epoch in range(4)])
    assert found.max() < 2.0
    assert found.mean() < 1.0


def turbo(image: Image.Image, subsampling: int) -> Packed:
    """A JPEG with chroma as Pillow cannot write it: TJSAMP_440 (4), TJSAMP_411 (5)."""
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitCompress.restype = ctypes.c_void_p
    handle, data, size = ctypes.c_void_p(library.tjInitCompress()), ctypes.c_void_p(), ctypes.c_ulong()
    pixels = np.ascontiguousarray(image)
    status = library.tjCompress2(
        handle, ctypes.c_void_p(pixels.ctypes.data), image.width, 0, image.height, 0,
        ctypes.byref(data), ctypes.byref(size), subsampling, 92, 0,
    )  # fmt: skip
    assert status == 0
    packed = Packed(True, *image.size, ctypes.string_at(data.value, size.value))
    library.tjFree(data)
    library.tjDestroy(handle)
    return packed


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "progressive", "rgb", 4, 5])
def test_every_kind_of_jpeg(photos, tmp_path, kind):
    options = {"progressive": {"progressive": True}, "rgb": {"keep_rgb": True, "subsampling": "4:4:4"}}
    if isinstance(kind, int):
        images = [turbo(image, kind) for image in crops(photos)]
    else:
        images = [jpeg(image, **options.get(kind, {"subsampling": kind})) for image in crops(photos)]
    assert differences(write(tmp_path / "train.beton", images), 64, ANY).max() < 2.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 77), (77, 1), (2, 3), (17, 16), (15, 33)])
@pytest.mark.parametrize("stored", ["4:2:0", "raw"])
def test_tiny_images(photos, tmp_path, shape, stored):
    whole = Image.open(photos[0]).convert("RGB")
    images = [whole.crop((9 * n, 7 * n, 9 * n + shape[1], 7 * n + shape[0])) for n in range(8)]
    packed = [jpeg(im) if stored != "raw" else Packed(False, *im.size, im.tobytes()) for im in images]
    assert differences(write(tmp_path / "train.beton", packed), 5, ANY).max() < 4.0  # few pixels: rounding weighs more


def test_a_grey_jpeg(photos, tmp_path):
    images = [jpeg(image.convert("L"), subsampling=0) for image in crops(photos)]
    assert differences(write(tmp_path / "train.beton", images), 64, ANY).max() < 1.0


def test_a_small_image_as_raw_pixels(photos, tmp_path):
    """As CIFAR lies: 32x32, resized boxes of a fifth of it and more."""
    whole = Image.open(photos[0]).convert("RGB")
    images = [whole.crop((29 * n, 17 * n, 29 * n + 32, 17 * n + 32)) for n in range(20)]
    beton = write(tmp_path / "train.beton", [Packed(False, 32, 32, image.tobytes()) for image in images])
    small = View(cut=RandomResizedCrop(kind="resized", scale=(0.2, 1.0)))
    assert differences(beton, 32, small).max() < 0.5
    assert differences(beton, 32, small, over=torch.max).max() <= 1


@pytest.mark.parametrize("size", [48, 30])
def test_raw_pixels_differ_by_rounding_alone(photos, tmp_path, size):
    images = [Packed(False, *image.size, image.tobytes()) for image in crops(photos)]
    beton = write(tmp_path / "train.beton", images)
    assert differences(beton, size, ANY).max() < 0.5
    assert differences(beton, size, ANY, over=torch.max).max() <= 4
    assert differences(beton, size, View(cut=RandomCrop(kind="crop"))).max() == 0  # copied, not resized


def test_jpegs_are_cropped_without_resizing_as_pillow_decodes_them(photos, tmp_path):
    """turbojpeg and Pillow are the same decoder but for its version: chroma is upsampled as Pillow does."""
    beton = write(tmp_path / "train.beton", [jpeg(image) for image in crops(photos)])
    assert differences(beton, 120, View(cut=RandomCrop(kind="crop", padding=12))).max() < 0.1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_large_images_are_decoded_reduced(photos, tmp_path, scale):
    from pipelines.loaders.cut_kernel import OVERSAMPLING, _reduction

    images = [image.resize((image.width * 3, image.height * 3), Image.Resampling.LANCZOS) for image in crops(photos)]
    images = [image for image in images if min(image.size) > 600]
    size = int(min(min(image.size) for image in images) * 0.6**0.5 * 0.75 / (OVERSAMPLING * scale / 2))
    beton = write(tmp_path / "train.beton", [jpeg(image) for image in images])
    order = epoch_order(beton.labels, "instance", 0, 0)
    cuts = draw_cuts((LARGE, LARGE), size, beton.heights[order], beton.widths[order], 0, 0)
    assert scale in {_reduction(of_image, size) for of_image in cuts}
    assert differences(beton, size, LARGE).max() < 2.0


def test_how_far_an_image_is_reduced():
    from pipelines.loaders.cut_kernel import OVERSAMPLING, _reduction

    size = 32
    for smallest, expected in [
        (size, 1),
        (OVERSAMPLING * size - 1, 1),
        (OVERSAMPLING * size, 2),
        (32 * size, 8),
        (999 * size, 8),
    ]:
        cuts = np.array([[0, 0, 40 * size, smallest, 0], [0, 0, 9999, 9999, 0]], dtype=np.int32)
        assert _reduction(cuts, size) == min(expected, 8)


def test_a_file_that_lies_about_its_size_is_not_believed(photos, tmp_path):
    """The record says 100 by 100; the JPEG is larger: it must neither be cut by the wrong box nor overflow a buffer."""
    from pipelines.common.errors import UserError
    from pipelines.loaders.ffcv_loader import FFCVLoader

    true = jpeg(crops(photos)[0])
    beton = write(tmp_path / "train.beton", [Packed(True, 100, 100, true.data)])
    of = ReadPlan((ANY,), 32, 1, 0, "instance", drop_last=True)
    with pytest.raises(UserError, match=r"image 0 of .* is damaged \(\d+x\d+ pixels, recorded as 100x100\)"):
        list(FFCVLoader(beton, of, LoaderConfig()).epoch(0))


def test_the_same_batch_from_any_number_of_threads(photos, tmp_path):
    from pipelines.loaders.ffcv_loader import FFCVLoader

    beton = write(tmp_path / "train.beton", [jpeg(image) for image in crops(photos)])
    of = ReadPlan((ANY, ANY), 64, 4, 0, "instance", drop_last=True)
    seen = [
        torch.cat([batch.views.clone() for batch in FFCVLoader(beton, of, LoaderConfig(workers=workers)).epoch(3)])
        for workers in (1, 2)
    ]
    assert all(torch.equal(first, second) for first, second in pairwise(seen))
