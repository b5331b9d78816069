"""`python -m benchmarks.export [--quick]`: images a second and size of fp32, fp16, int8 beside PyTorch on the CPU.

ResNet-32, 32x32, batches of 64, all cores; PyTorch eager (channels last, inference mode) and `torch.compile` in float32. The
sides take turns, medians of the rounds. The weights are as drawn, and int8 is calibrated on noise:
as fast as trained ones; accuracy is what `cibl_ray.export` measures.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import alternate, report
from benchmarks.serve import make_bundle
from cibl_ray.bundle.card import FILES
from cibl_ray.bundle.runtime import Runtime
from cibl_ray.bundle.targets import this_machine
from cibl_ray.exporting.onnx_graph import export_base, finish, to_fp16, to_int8
from cibl_ray.networks.config import Needs, NetworkConfig
from cibl_ray.networks.network import HybridNetwork, build_network
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import run_command
from pipelines.config import DataConfig
from pipelines.prepare.sources import DigitsSource

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rounds")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_export_"))
    try:
        runtimes = _runtimes(folder)
        sizes = {name: (folder / "bundle" / FILES[name]).stat().st_size for name in runtimes}
        rounds = 3 if arguments.quick else 9
        network, images, data = _network(), _noise(BATCH), DataConfig(source=DigitsSource(kind="digits"))
        calls = 2 if arguments.quick else 8
        normalize = Normalize(data)

        def torch_side(run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], int]:
            views = torch.from_numpy(images)[:, None]

            def side() -> int:
                with torch.inference_mode():
                    for _ in range(calls):
                        run(normalize(views)).numpy()
                return calls * BATCH

            return side

        def onnx_side(runtime: Runtime) -> Callable[[], int]:
            def side() -> int:
                for _ in range(calls):
                    runtime(images, outputs=("logits",))
                return calls * BATCH

            return side

        sides = {"eager": torch_side(network.classify), "compile": torch_side(torch.compile(network.classify))}
        sides |= {name: onnx_side(runtime) for name, runtime in runtimes.items()}
        rates = alternate(sides, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fp32 = rates["fp32"]["median"]
    report(
        images_per_s=rates,
        bytes=sizes,
        ratios={
            "fp32_over_eager": round(fp32 / rates["eager"]["median"], 2),
            "fp32_over_compile": round(fp32 / rates["compile"]["median"], 2),
            "int8_over_fp32": round(rates["int8"]["median"] / fp32, 2),
            "fp16_over_fp32": round(rates["fp16"]["median"] / fp32, 2),
        },
    )


def _network() -> HybridNetwork:
    needs = Needs(projection=False, prototypes=None, detached_head=False)
    return build_network(NetworkConfig(backbone="resnet32"), 10, needs, 0).eval()


def _noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _runtimes(folder: Path) -> dict[str, Runtime]:
    bundle = make_bundle(folder / "bundle")
    base = folder / "base.onnx"
    export_base(_network(), DataConfig(source=DigitsSource(kind="digits")), False, base)
    to_fp16(base, folder / "fp16.onnx")
    to_int8(base, folder / "int8.onnx", _noise(128), this_machine())
    counts = np.arange(10, 0, -1)
    card = Runtime(bundle / "model.onnx", "cpu").card
    for precision in ("fp16", "int8"):
        finish(folder / f"{precision}.onnx", bundle / FILES[precision], counts, {**card.dump(), "precision": precision})
    return {name: Runtime(bundle / file, "cpu") for name, file in FILES.items()}


if __name__ == "__main__":
    run_command(main)
