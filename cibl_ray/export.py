"""`python -m cibl_ray.export RUN [--precision fp32 fp16 int8]`: export a checkpoint as a bundle, to serve or to run alone.

RUN is a run folder, or a checkpoint file. The bundle is a folder of ONNX files with a manifest and a model card. It appears
only when everything in it is verified: ONNX against torch, the server's pixels against those of the evaluation, and every
precision's accuracy on the test images with onnxruntime.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cibl_ray.run.shift import asked_shift, shift_or_auto
from cibl_ray.run.which import checkpoint
from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.common.words import plural


def main() -> None:
    """Export a run as the command line says, and print the accuracy of each precision.

    Raises:
        UserError: An option does not fit, the run cannot be read, or a precision loses more accuracy than allowed.
    """
    parser = CommandParser(prog="python -m cibl_ray.export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint file")
    parser.add_argument("--checkpoint", choices=["best", "last"], help="of a run folder; by default best, else last")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32"], help="fp32 is always made"
    )
    parser.add_argument("--out", type=Path, help="the bundle's folder; by default `bundle` in the run folder")
    parser.add_argument("--name", help="the model's name for its clients; by default the run's")
    parser.add_argument("--embedding", action="store_true", help="a further output: the image's unit embedding")
    parser.add_argument("--target", choices=["x86", "x86-avx2", "arm"], help="CPU that int8 is for; by default this one")
    parser.add_argument("--max-drop", type=_points, help="points a shot group may lose to fp16 or int8; default 1")
    parser.add_argument("--calibration", type=_count, help="images that calibrate int8; default 512")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto", help="of onnxruntime")
    parser.add_argument(
        "--tail-shift",
        type=shift_or_auto,
        metavar="auto|NUMBER",
        help="what the answers have of it by default; by default auto: what the run's validation images chose, else 0",
    )
    arguments = parser.parse_args()
    made = " and ".join(dict.fromkeys(["fp32", *arguments.precision]))
    for option, value, of in (
        ("--target", arguments.target, {"int8"}),
        ("--calibration", arguments.calibration, {"int8"}),
        ("--max-drop", arguments.max_drop, {"fp16", "int8"}),
    ):
        if value is not None and not of & {*arguments.precision}:
            raise UserError(f"{option} {value} does nothing for {made}; add --precision {' or '.join(sorted(of))}")
    from cibl_ray.evaluation.tail_shift import recorded_choice
    from cibl_ray.exporting.make_bundle import Options, make_bundle

    logging.basicConfig(format="%(message)s")
    logging.getLogger("cibl_ray.exporting").setLevel(logging.INFO)
    path = checkpoint(arguments.run, arguments.checkpoint)
    out = arguments.out or (arguments.run if arguments.run.is_dir() else arguments.run.with_suffix("")) / "bundle"
    options = Options(
        precisions=tuple(dict.fromkeys(["fp32", *arguments.precision])),
        name=arguments.name,
        embedding=arguments.embedding,
        target=arguments.target,
        max_drop=1.0 if arguments.max_drop is None else arguments.max_drop,
        calibration=arguments.calibration or 512,
        provider=arguments.provider,
        tail_shift=asked_shift(path, arguments.tail_shift),
    )
    print(make_bundle(path, out.absolute(), options).table())
    if options.tail_shift:
        chosen = recorded_choice(path) if arguments.tail_shift in (None, "auto") else None
        by = "" if chosen is None else f" (chosen on {plural(chosen.images, 'held-out image')})"
        print(f"answers have tail shift {options.tail_shift:g}{by}; --tail-shift 0: as trained")
    print(f"bundle: {out}; serve it: python -m serve {out}")


def _points(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError("points of accuracy, 0 to 100")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError("a number of images, 1 to 100,000")
    return value


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,export]'")
