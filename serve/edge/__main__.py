"""`python -m serve.edge URL IMAGE...`: a service's model on this machine, alone.

Downloads the model once, resumes a download that broke off, and accepts only the checksum that the service names. IMAGE is a
file, a folder, or '-' for JPEG images on standard input one after another, such as ffmpeg's MJPEG. Needs numpy, Pillow and
onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.pixels import BadImageError
from serve.decode import MAX_SHIFT
from serve.edge.download import download
from serve.edge.model import Edge, images


def main() -> None:
    """Parse the command line, download the model if it is a URL, and classify the images."""
    parser = CommandParser(prog="python -m serve.edge", description=__doc__)
    parser.add_argument("model", metavar="URL", help="a service, a model's file there, or a local .onnx file")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders, or '-' for JPEG images on standard input")
    parser.add_argument("--name", help="which model, where the service has several")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--top", type=_count, default=1, help="classes of each image (default: 1)")
    parser.add_argument("--tail-shift", type=_shift, default=0.0, help="more of it favours rare classes (default: 0)")
    parser.add_argument("--threads", type=_count, help="threads of onnxruntime (default: all cores)")
    parser.add_argument(
        "--cache", type=Path, default=_default_cache(), help="folder for downloaded models (default: %(default)s)"
    )
    parser.add_argument("--key", default=os.environ.get("CIBL_RAY_API_KEY"), help="API key (default: CIBL_RAY_API_KEY)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image")
    arguments = parser.parse_args()
    path = Path(arguments.model)
    if not path.is_file():
        path = download(arguments.model, arguments.cache, arguments.name, arguments.precision, arguments.key)
    edge = Edge(path, arguments.threads)
    card = edge.card
    print(f"{card.name} ({card.precision}), {len(card.classes)} classes, {edge.runtime.provider}", file=sys.stderr)
    failed = 0

    def tell(line: str) -> None:
        nonlocal failed
        failed += line.startswith("error: ")
        print(line.removeprefix("error: "), file=sys.stderr)

    for place, data in images(arguments.images, sys.stdin.buffer, tell):
        try:
            begun = time.perf_counter()
            answer = edge.classify(data, arguments.top, arguments.tail_shift)
        except BadImageError as error:
            tell(f"error: {place}: {error}")
            continue
        if arguments.json:
            print(json.dumps({"image": place, "top": answer, "ms": round(1000 * (time.perf_counter() - begun), 2)}), flush=True)
        else:
            labels = (f"{entry['label']} {100 * entry['probability']:.1f} % ({entry['group']})" for entry in answer)
            print(place, *labels, sep="\t", flush=True)
    if failed:
        raise UserError(f"{failed} of the images and folders could not be read; the lines above say why")


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 99999")
    return int(text)


def _shift(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_SHIFT:  # false for NaN too
        raise argparse.ArgumentTypeError(f"{text} is not a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
    return value


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibl_ray"


def command() -> NoReturn:
    """The console script `cibl-ray-edge`, which also works beside a file `serve.py`."""
    run_command(main, "onnxruntime")


if __name__ == "__main__":
    command()
