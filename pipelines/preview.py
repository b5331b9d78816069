"""`python -m pipelines.preview CONFIG [--out FILE]`: the views of a few training images as the network sees them.

A row an image: the stored one, then every view, cut, flipped and augmented by its own draw, before only the normalisation.
Images, cuts and flips are the first of the epoch that training would show; colours are drawn for a batch of so many images.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipelines.augment.recipe import Augment
from pipelines.common.command_line import ConfigParser
from pipelines.common.errors import UserError, run_command
from pipelines.common.files import need_writable, write_atomically
from pipelines.common.fonts import Pen
from pipelines.common.words import plural
from pipelines.config import LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import train_plan
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.command import from_command_line
from pipelines.prepare.shots import shot_groups

_TILE, _GAP, _LINE = 160, 6, 16  # pixels of a tile's side, between tiles, of a line of text


def main() -> None:
    """The command."""
    parser = ConfigParser(
        "pipelines.prepare.command:PrepareConfig",
        prog="python -m pipelines.preview",
        usage="%(prog)s CONFIG [--out FILE] [--images N] [--epoch E] [--field value ...]",
        description="A picture of what the network sees of the first training images of an epoch.",
    )
    parser.add_argument("--out", type=Path, help="the picture to write; by default views.png in the prepared folder")
    parser.add_argument("--images", type=int, default=6, help="how many images, 1 to 64 (6)")
    parser.add_argument("--epoch", type=int, default=0, help="whose draws are shown, from 0 on (0)")
    asked = from_command_line(parser)
    if asked is None:
        return
    config, arguments = asked
    if not 1 <= arguments.images <= 64 or arguments.epoch < 0:
        raise UserError(f"--images {arguments.images} --epoch {arguments.epoch}: 1 to 64 images, an epoch from 0 on")
    if arguments.out is not None:
        _check(arguments.out)
    prepared = ensure_prepared(config.data, config.seed)
    out = arguments.out or prepared.folder / "views.png"
    need_writable(out.parent, str(out), "name another file: --out FILE.png")
    count = min(arguments.images, prepared.splits["train"].samples)
    plan = train_plan(config.data, count, config.seed)
    loader = make_loader(prepared, "train", plan, LoaderConfig())
    epoch = loader.epoch(arguments.epoch)
    batch = next(epoch)  # its views are the loader's own buffer until `epoch` continues
    views = Augment(plan.views, plan.size, plan.seed)(batch.views, arguments.epoch, 0).clone()
    beton, counts = prepared.beton("train"), prepared.train_counts
    groups = shot_groups(counts)
    rows = []
    for number, (row, label) in enumerate(zip(batch.index.tolist(), batch.labels.tolist(), strict=True)):
        stored = beton.image(row)
        image = Image.fromarray(stored) if beton.is_raw[row] else Image.open(io.BytesIO(stored.tobytes())).convert("RGB")
        of_class = f"{prepared.classes[label]}: {plural(int(counts[label]), 'image')} ({groups[label]})"
        text = f"{of_class}, stored {image.width}x{image.height}"
        rows.append((text, [image, *_images(views[number])]))
    loader.close()
    picture = io.BytesIO()
    _grid(rows, out.name).save(picture, Image.registered_extensions()[out.suffix.lower()])
    out.parent.mkdir(parents=True, exist_ok=True)  # of published data, none is here yet
    write_atomically(out, picture.getvalue())
    size = config.data.size
    print(f"{plural(count, 'image')}, {plural(len(config.data.views), 'view')} of {size}x{size}: {out}")
    if "size" not in config.data.model_fields_set:
        print(f"data.size is not set: {size} is the default; a pretrained network is shown its own size, often --data.size 224")


def _check(out: Path) -> None:
    """Raise UserError where no new picture can be written."""
    kind = Image.registered_extensions().get(out.suffix.lower())
    if kind not in Image.SAVE or not out.parent.is_dir():  # Pillow reads more formats than it writes
        raise UserError(f"--out {str(out)!r}: name a file such as views.png in a folder that exists")
    if out.exists():
        raise UserError(f"{str(out)!r} exists; remove it, or name another file (--out)")
    need_writable(out.parent, f"--out {out}", "name a file in another folder")


def _images(views: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(view)) for view in views]


def _grid(rows: list[tuple[str, list[Image.Image]]], name: str) -> Image.Image:
    """Each row's text above its images, fitted into tiles without changing their shape."""
    columns, height = max(len(images) for _, images in rows), _TILE + _LINE + _GAP
    canvas = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, len(rows) * height + _GAP), "white")
    draw, pen = ImageDraw.Draw(canvas), Pen([text for text, _ in rows], 11, name)
    for number, (text, images) in enumerate(rows):
        top = _GAP + number * height
        pen.write(draw, (_GAP, top), text)
        for column, image in enumerate(images):
            scale = _TILE / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Small images are shown as the pixels they are.
            tile = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
            canvas.paste(tile, (_GAP + column * (_TILE + _GAP), top + _LINE))
    return canvas


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train]'")
