"""`python -m serve.edge URL IMAGE...`: a service's model on this machine, alone.

Downloads the model once, resumes a download that broke off, and accepts only the checksum that the service names. IMAGE is a
file, a folder, or '-' for JPEG images on standard input one after another, such as ffmpeg's MJPEG. Needs numpy, Pillow and
onnxruntime.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from cibl_ray.bundle.card import MAX_SHIFT
from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.library_warnings import collected_warnings
from pipelines.pixels import MAX_PIXELS, BadImageError
from serve.edge.api import default_cache, local_file
from serve.edge.download import download
from serve.edge.model import Edge, images, listed
from serve.edge.results import ENDINGS, Results


def main() -> None:
    """Parse the command line, download the model if it is a URL, and classify.

    Raises:
        UserError: An argument is wrong, or the model cannot be had.
    """
    parser = CommandParser(prog="python -m serve.edge", description=__doc__)
    parser.add_argument("model", metavar="URL", help="a service, a model's file there, a bundle's folder, or an .onnx file")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders, or '-' for JPEG images on standard input")
    parser.add_argument("--name", help="which model, where the service has several")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], help="default: fp32, or what an .onnx file has")
    parser.add_argument("--top", type=_count, default=1, help="classes of each image (default: 1)")
    parser.add_argument("--tail-shift", type=_shift, default=0.0, help="more of it favours rare classes (default: 0)")
    parser.add_argument("--threads", type=_count, help="threads of onnxruntime (default: all cores)")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for downloaded models (default: %(default)s)"
    )
    parser.add_argument("--key", default=os.environ.get("CIBL_RAY_API_KEY"), help="API key (default: CIBL_RAY_API_KEY)")
    parser.add_argument(
        "--max-pixels", type=_pixels, default=MAX_PIXELS, help="pixels of an image, at most (default: %(default)s)"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="a JSON object for each image")
    shape.add_argument("--out", type=_table, metavar="FILE", help="write the answers to FILE.csv or FILE.jsonl instead")
    arguments = parser.parse_args()
    path = local_file(arguments.model, arguments.precision, arguments.name)
    if path is None:
        path = download(arguments.model, arguments.cache, arguments.name, arguments.precision, arguments.key)
    edge = Edge(path, arguments.threads, arguments.max_pixels, arguments.precision)
    card = edge.card
    print(f"{card.name} ({card.precision}), {len(card.classes)} classes, {edge.runtime.provider}", file=sys.stderr)
    failed = 0
    show: Callable[[str], None] = functools.partial(print, file=sys.stderr)

    def tell(line: str) -> None:
        nonlocal failed
        failed += line.startswith("error: ")
        show(line.removeprefix("error: "))

    with collected_warnings() as warned, Results(arguments.out) if arguments.out else nullcontext() as results:
        places = listed(arguments.images, tell)
        waiting: Iterable[str] = places
        # Standard input has any number of images, and a terminal that gets the answers needs no bar.
        if "-" not in places and sys.stderr.isatty() and (results is not None or not sys.stdout.isatty()):
            from tqdm import tqdm  # here, so that a device without a terminal needs no tqdm

            waiting = tqdm(places, unit="image", leave=False)
            show = functools.partial(tqdm.write, file=sys.stderr)  # above the bar
        for place, data in images(waiting, sys.stdin.buffer, tell):
            try:
                begun = time.perf_counter()
                warned.begin(place)
                answer = edge.classify(data, arguments.top, arguments.tail_shift)
            except BadImageError as error:
                tell(f"error: {place}: {error}")
                if results is not None:
                    results.write(place, [], str(error))
                continue
            if results is not None:
                results.write(place, answer)
            elif arguments.json:
                milliseconds = round(1000 * (time.perf_counter() - begun), 2)
                print(json.dumps({"image": place, "top": answer, "ms": milliseconds}), flush=True)
            else:
                labels = (f"{entry['label']} {100 * entry['probability']:.1f} % ({entry['group']})" for entry in answer)
                print(place, *labels, sep="\t", flush=True)
    if text := warned.text():
        print(text, file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of the images and folders could not be read; the lines above say why")


def _table(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text} ends in neither {' nor '.join(ENDINGS)}")
    return path


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 99999")
    return int(text)


def _pixels(text: str) -> int:
    if not (text.isdecimal() and len(text) < 11 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text} is not a number of pixels from 1 to 9999999999")
    return int(text)


def _shift(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_SHIFT:  # false for NaN too
        raise argparse.ArgumentTypeError(f"{text} is not a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
    return value


def command() -> NoReturn:
    """The console script `cibl-ray-edge`, which also works beside a file `serve.py`."""
    run_command(main, "onnxruntime")


if __name__ == "__main__":
    command()
