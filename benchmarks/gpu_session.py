"""`scripts/gpu_session.sh pack FOLDER ARCHIVE` here, `scripts/gpu_session.sh run ARCHIVE` on a machine with a GPU.

pack  Packs what the session reads of CIFAR-100, an image folder (train/CLASS/*, test/CLASS/*): the long-tailed training
      images at imbalance factor 100 and the test images, as they are prepared, about 50 MB.
run   In --minutes (8): the tests that need a GPU, the benchmarks of losses and of the step, one whole CIBL run of 200 epochs,
      and then as many cells of the table cifar100_lt side by side as time allows. Each result is printed as it comes, and is a
      line of OUT/results.jsonl; the cells' lines are OUT/cifar100_lt-gpu.jsonl. It needs torch, the extra `train`, pytest,
      pytest-timeout and psutil, and neither Ray nor FFCV. A step that fails or runs past its time stops no other.
      --budget smoke: all of it in small, on a CPU, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.reproduce.cells import cells
from benchmarks.train import WHOLE_RUN_QUICK
from cibl_ray.config import load_config
from pipelines.common.errors import UserError, run_command
from pipelines.prepare.build import ensure_prepared, prepared_folder

REPOSITORY = Path(__file__).resolve().parents[1]
# The source that the packed data are prepared from, by name: it is on no machine, so the prepared images are used as they are.
_SOURCE = ("--data.source.kind", "folder", "--data.source.path")
_NOWHERE = "/cibl-ray-gpu-session/cifar100"
GPU_TESTS = (
    *(f"tests/pipelines/test_{name}.py" for name in ("augment", "resident")),
    *(f"tests/cibl_ray/test_{name}.py" for name in ("feed", "losses", "objective", "train")),
)
LEAST = 20  # seconds that are left for a step to be worth beginning
_GRACE = 15.0  # seconds for a step that is interrupted
_STEP_DATA = ("--data.profile", "{kind: exp, imbalance: 100, subset: field}")


def data_options(budget: str) -> list[list[str]]:
    """A configuration's name and options for every folder of prepared data that the session reads."""
    every = [[cell.config, *cell.options] for cell in cells("cifar100_lt", budget, 1, 0.0) if cell.imbalance == 100]
    every.append(["cifar10_lt", *_STEP_DATA])
    if budget == "smoke":
        every.append([*every[0], *WHOLE_RUN_QUICK])
    return every


def pack(images: Path, archive: Path, budget: str, prepared: Path, preset: int = 6) -> int:
    """Write the archive.

    Args:
        images: CIFAR-100 as an image folder.
        archive: A .tar.xz file.
        budget: Of the session that will read it.
        prepared: Where the data are prepared first.
        preset: How hard xz compresses, 0 to 9.

    Returns:
        Its size in bytes.
    """
    names: dict[str, Path] = {}
    for config, *options in data_options(budget):
        here, there = (load_config(config, [*options, *_SOURCE, place]) for place in (str(images), _NOWHERE))
        data, name = here.data.model_copy(update={"prepared": prepared}), prepared_folder(there.data, there.seed).name
        if name not in names:
            names[name] = ensure_prepared(data, here.seed).folder
    with lzma.open(archive, "wb", preset=preset) as compressed, tarfile.open(fileobj=compressed, mode="w") as file:
        for name, folder in names.items():
            file.add(folder, name)
    return archive.stat().st_size


class Session:
    """The steps of a session, each a process with a limit of time.

    Args:
        out: Folder of the results.
        seconds: For all of it.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.ends = out, time.monotonic() + seconds
        self.results: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds until the session's end."""
        return self.ends - time.monotonic()

    def step(self, name: str, *command: str, most: float | None = None) -> dict[str, Any]:
        """Run a step, print its last line, and keep it in results.jsonl.

        Args:
            name: Of the step.
            command: Arguments of Python.
            most: Its limit in seconds; None: what is left. At the limit it is interrupted, as by Ctrl-C.
        """
        limit = min(self.left, self.left if most is None else most)
        if limit < LEAST:
            return self._keep({"step": name, "skipped": "no time left"})
        print(f"== {name}: at most {limit:.0f} s", flush=True)
        begun = time.monotonic()
        with (self.out / f"{name}.log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                try:
                    code = process.wait(limit)
                finally:
                    _end(process)
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        content: dict[str, Any] = {"step": name, "seconds": round(time.monotonic() - begun, 1), "exit": code}
        try:
            content["result"] = json.loads(last)
        except ValueError:
            content["last_line"] = last[-300:]
        return self._keep(content)

    def _keep(self, content: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(content, ensure_ascii=False)
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        self.results.append(content)
        return content


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a step that still runs, as by Ctrl-C: what trains keeps a checkpoint. Then all its processes are killed."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive. `extractall` has its safe filter from Python 3.11.4 on alone.

    Args:
        archive: What `pack` made.
        folder: Where; it is made.

    Raises:
        UserError: A member would be written outside of it.
    """
    with tarfile.open(archive) as file:
        for member in file:
            if (content := file.extractfile(member)) is None:
                continue
            path = folder / member.name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{archive}: {member.name!r} would be written outside of {str(folder)!r}; pack it again")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


def run(archive: Path, out: Path, budget: str, minutes: float, jobs: int) -> Session:
    """Run the session. What fails is in its results.

    Args:
        archive: What `pack` made.
        out: Folder of the results.
        budget: 'gpu' or 'smoke'.
        minutes: For all of it.
        jobs: Cells side by side.
    """
    out.mkdir(parents=True, exist_ok=True)
    session, small = Session(out, 60 * minutes), budget == "smoke"
    prepared = out / "prepared"
    unpack(archive, prepared)
    print(json.dumps({"machine": machine(), "budget": budget, "minutes": minutes}), flush=True)
    images, place = ("--images", _NOWHERE), ("--prepared", str(prepared))
    quick = ("--quick",) if small else ()
    share = 60 * minutes / 8
    session.step("tests", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS, most=share)
    session.step("losses", "-m", "benchmarks.losses", "--quick", "--no-step", most=share)
    session.step("step", "-m", "benchmarks.train", "step", *images, *quick, *place, *_STEP_DATA, most=share)
    compiled = () if small else ("--compile",)
    whole = ("-m", "benchmarks.train", "whole_run", *images, *quick, *compiled, *place)
    session.step("whole_run", *whole, most=2.5 * share)
    table = ("-m", "benchmarks.reproduce", "cifar100_lt", "--budget", budget, "--factors", "100", "--seeds", "1")
    cells_of = ("--methods", "CE", "VS") if small else ()
    hours = ("--hours", f"{max(session.left - LEAST, 1) / 3600:.4f}", "--jobs", str(jobs))
    places = (*place, "--runs", str(out / "runs"), "--docs", str(out), "--cifar100", _NOWHERE)
    session.step("table", *table, *cells_of, *hours, *places)
    return session


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_session.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    packing, running = modes.add_parser("pack"), modes.add_parser("run")
    packing.add_argument("images", type=Path, help="CIFAR-100 as an image folder")
    packing.add_argument("archive", type=Path, help="the .tar.xz file to write")
    packing.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder for .beton files")
    running.add_argument("archive", type=Path, help="what `pack` made")
    running.add_argument("--out", type=Path, default=Path("gpu-session"), help="folder of the results")
    running.add_argument("--minutes", type=float, default=8)
    running.add_argument("--jobs", type=int, default=4, help="cells side by side")
    for mode in (packing, running):
        mode.add_argument("--budget", choices=("gpu", "smoke"), default="gpu")
    arguments = parser.parse_args()
    if arguments.mode == "pack":
        size = pack(arguments.images, arguments.archive, arguments.budget, arguments.prepared.absolute())
        print(f"{arguments.archive}: {size / 1e6:.1f} MB")
        return
    if not arguments.archive.is_file():
        raise UserError(f"{arguments.archive} is not there; make it with: scripts/gpu_session.sh pack FOLDER ARCHIVE")
    session = run(arguments.archive.absolute(), arguments.out.absolute(), arguments.budget, arguments.minutes, arguments.jobs)
    failed = [result["step"] for result in session.results if result.get("exit") != 0]
    print(f"results: {arguments.out}/results.jsonl" + (f"; not finished: {', '.join(failed)}" if failed else ""))


if __name__ == "__main__":
    run_command(main)
