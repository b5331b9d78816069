"""`python -m benchmarks.serve [--quick] [--images FOLDER]`: the service beside LitServe and beside onnxruntime alone.

The same ONNX file (ResNet-32, 32x32), the same JPEG files in base64 and JSON, one onnxruntime thread each; `wrk` asks with
1, 16 and 64 connections, the sides in turn. LitServe gets each of three settings (each request alone; batches of 16 within
5 ms; the same over its faster queue), and the best counts. onnxruntime alone: a loop without decoding and without HTTP, at
the fastest batch.

What each costs: seconds until it is ready, processes, memory, and CPU while nobody asks. Then trouble: 64 connections while
the model is swapped, while a replica is killed, while replicas are taken away.
Needs `wrk` (apt-get install wrk) and `pip install litserve`.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.measure import report
from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import run_command

PORT = 8971
IDLE, PATIENCE = 8.0, 90  # percent of the CPUs below which a server has started all that it starts; seconds to wait for that
LITSERVE = """
import base64, io, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import litserve, numpy as np, onnxruntime
from PIL import Image

class Api(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
        self.names = {names!r}

    def decode_request(self, request):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB"))

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        images = images if images.ndim == 4 else images[None]
        return self.session.run(["probabilities"], {{"images": images}})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        row = output.reshape(-1)
        best = np.argsort(-row)[:5]
        return {{"top": [{{"label": self.names[i], "probability": float(row[i])}} for i in best]}}

if __name__ == "__main__":
    api = Api(max_batch_size={batch}, batch_timeout={wait})
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue={fast}, track_requests=False)
    server.run(host="127.0.0.1", port={port}, log_level="error", generate_client_file=False, access_log=False)
"""
SETTINGS = {"alone": (1, 0.0, False), "batches": (16, 0.005, False), "batches_fast_queue": (16, 0.005, True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, no trouble")
    parser.add_argument("--images", type=Path, help="JPEG files of 32x32 anywhere below; by default digits")
    arguments = parser.parse_args()
    for name, there in (("wrk", shutil.which("wrk")), ("litserve", importlib.util.find_spec("litserve"))):
        if not there:
            sys.exit(f"{name} is not installed: {'apt-get install wrk' if name == 'wrk' else 'pip install litserve'}")
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_serve_bench_"))
    rounds, seconds = (1, 2) if arguments.quick else (3, 4)
    connections = (16, 64) if arguments.quick else (1, 16, 64)
    try:
        images = _images(arguments.images)
        bundle = make_bundle(folder / "bundle")
        scripts = _scripts(folder, images)
        alone = _onnxruntime(bundle / "model.onnx", images)
        figures: dict[str, dict[int, list[dict[str, float]]]] = {}
        weights: dict[str, list[dict[str, float]]] = {}
        settings = SETTINGS if not arguments.quick else {"batches": SETTINGS["batches"]}
        for _ in range(rounds):
            with service(bundle) as ours:
                weights.setdefault("ours", []).append(_weigh(ours, 2 * seconds))
                _measure(figures, "ours", f"{ours.url}/v1/predict", scripts["json"], connections, seconds)
                _measure(figures, "ours_raw_bytes", f"{ours.url}/v1/predict", scripts["raw"], connections, seconds)
            with service(bundle, "--simple") as ours:
                weights.setdefault("ours_simple", []).append(_weigh(ours, 2 * seconds))
                _measure(figures, "ours_simple", f"{ours.url}/v1/predict", scripts["json"], connections, seconds)
            for name, setting in settings.items():
                with _litserve(bundle, folder, *setting) as other:
                    weights.setdefault("litserve", []).append(_weigh(other, 2 * seconds))
                    _measure(figures, f"litserve_{name}", f"{other.url}/predict", scripts["json"], connections, seconds)
        trouble = {} if arguments.quick else _trouble(bundle, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {
        side: {n: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]} for n, rows in by.items()}
        for side, by in figures.items()
    }
    weight = {
        side: {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]} for side, rows in weights.items()
    }
    theirs = [side for side in medians if side.startswith("litserve")]
    best = {n: max((medians[side][n] for side in theirs), key=lambda row: row["requests_per_s"]) for n in connections}
    ratios = {
        f"over_litserve_{n}": round(medians["ours"][n]["requests_per_s"] / best[n]["requests_per_s"], 2) for n in connections
    }
    ratios |= {f"p99_over_litserve_{n}": round(medians["ours"][n]["p99_ms"] / best[n]["p99_ms"], 2) for n in connections}
    ratios["over_ort_64"] = round(medians["ours"][64]["requests_per_s"] / alone, 2)
    report(sides=medians, weight=weight, onnxruntime_alone_images_per_s=round(alone, 1), trouble=trouble, ratios=ratios)


def make_bundle(folder: Path, seed: int = 0, backbone: Any = "resnet32", size: int = 32, name: str = "cifar") -> Path:
    """Write a bundle of ten classes whose weights are as drawn: as fast as a trained one.

    Args:
        folder: The bundle.
        seed: Of the weights.
        backbone: As in a run's configuration.
        size: Width and height of an image, in pixels.
        name: The model's.

    Returns:
        The bundle.
    """
    from cibl_ray.bundle.card import MANIFEST, Card, file_sha256
    from cibl_ray.exporting.onnx_graph import export_base, finish
    from cibl_ray.networks.config import Needs, NetworkConfig
    from cibl_ray.networks.network import build_network
    from pipelines.config import DataConfig
    from pipelines.pixels import EvalRule
    from pipelines.prepare.sources import DigitsSource

    folder.mkdir(parents=True)
    counts = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    needs = Needs(projection=False, prototypes=None, detached_head=False)
    network = build_network(NetworkConfig.model_validate({"backbone": backbone}), 10, needs, seed).eval()
    export_base(network, DataConfig(source=DigitsSource(kind="digits"), size=size), False, folder / "base")
    groups = ["many"] * 8 + ["medium"] * 2
    classes, rule = [f"class {i}" for i in range(10)], EvalRule(size, 1.0 if size < 64 else 0.875)
    card = Card(name, "fp32", classes, counts.tolist(), groups, rule, {}, {}, {}).dump()
    finish(folder / "base", folder / "model.onnx", counts, card)
    (folder / "base").unlink()
    manifest = {**card, "precisions": ["fp32"], "files": {"model.onnx": file_sha256(folder / "model.onnx")}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def _images(folder: Path | None) -> list[bytes]:
    if folder is not None:
        found = sorted(folder.rglob("*.jpg"))
        return [path.read_bytes() for path in found[:: max(1, len(found) // 64)][:64]]
    from sklearn.datasets import load_digits

    files = []
    for digit in load_digits().images[:64]:
        buffer = io.BytesIO()
        Image.fromarray((digit * 15).astype(np.uint8)).convert("RGB").resize((32, 32)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def _scripts(folder: Path, images: list[bytes]) -> dict[str, Path]:
    """For wrk: every request another image; raw bytes, or base64 in JSON."""
    scripts = {}
    for kind in ("raw", "json"):
        for number, image in enumerate(images):
            body = image if kind == "raw" else json.dumps({"image": base64.b64encode(image).decode()}).encode()
            (folder / f"{kind}-{number}").write_bytes(body)
        content = "image/jpeg" if kind == "raw" else "application/json"
        scripts[kind] = folder / f"{kind}.lua"
        scripts[kind].write_text(
            f"""local requests, at = {{}}, 0
init = function()
  for i = 0, {len(images) - 1} do
    local file = io.open("{folder}/{kind}-" .. i, "rb")
    requests[i] = wrk.format("POST", nil, {{["Content-Type"] = "{content}"}}, file:read("*a"))
    file:close()
  end
end
request = function() at = (at + 1) % {len(images)}; return requests[at] end
"""
        )
    return scripts


def _onnxruntime(model: Path, images: list[bytes]) -> float:
    """Images a second, one thread, at the best batch size."""
    runtime = Runtime(model, "cpu", 1)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    best = 0.0
    for size in (1, 4, 16, 32):
        batch = pixels[:size]
        runtime(batch)
        end, done, begun = time.perf_counter() + 1.5, 0, time.perf_counter()
        while time.perf_counter() < end:
            runtime(batch)
            done += len(batch)
        best = max(best, done / (time.perf_counter() - begun))
    return best


@dataclass
class Started:
    """A server.

    Attributes:
        url: Where it answers.
        process: Its first process.
        ready_s: Seconds until it was ready.
    """

    url: str
    process: subprocess.Popen
    ready_s: float


@contextmanager
def service(bundle: Path, *options: str) -> Iterator[Started]:
    """Our server in its own processes."""
    command = [sys.executable, "-m", "serve", str(bundle), "--port", str(PORT), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        seconds = _until_ready(f"http://127.0.0.1:{PORT}/v2/health/ready", process)
        yield Started(f"http://127.0.0.1:{PORT}", process, seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


@contextmanager
def _litserve(bundle: Path, folder: Path, batch: int, wait: float, fast: bool) -> Iterator[Started]:
    names = [f"class {i}" for i in range(10)]
    (folder / "litserve_app.py").write_text(LITSERVE.format(batch=batch, wait=wait, fast=fast, port=PORT + 20, names=names))
    command = [sys.executable, str(folder / "litserve_app.py"), str(bundle / "model.onnx")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        seconds = _until_ready(f"http://127.0.0.1:{PORT + 20}/health", process)
        yield Started(f"http://127.0.0.1:{PORT + 20}", process, seconds)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(1)


def _weigh(server: Started, seconds: float) -> dict[str, float]:
    """What a server costs while nobody asks it: processes, MB (shared pages are counted once), percent of a core."""
    first = psutil.Process(server.process.pid)
    family = [first, *first.children(recursive=True)]

    def cpu() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    begun, before = time.perf_counter(), cpu()
    time.sleep(seconds)
    return {
        "ready_s": server.ready_s,
        "processes": len(family),
        "pss_mb": sum(process.memory_full_info().pss for process in family) / 1e6,
        "cpu_percent_of_a_core": 100 * (cpu() - before) / (time.perf_counter() - begun),
    }


def _until_ready(url: str, process: subprocess.Popen) -> float:
    """Wait until a server answers, then until the machine is idle. Returns the seconds of the first."""
    begun = time.monotonic()
    end = begun + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    seconds = time.monotonic() - begun
                    _until_idle()
                    return seconds
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{url} did not become ready: {process.stderr.read() if process.stderr else ''}")
        time.sleep(0.05)


def _until_idle() -> None:
    """Wait until the work of a start is over: Ray's processes are busy for a while after the first answer."""
    end, quiet = time.monotonic() + PATIENCE, 0
    while quiet < 3 and time.monotonic() < end:
        quiet = quiet + 1 if psutil.cpu_percent(interval=1) < IDLE else 0


def _measure(figures: dict, side: str, url: str, script: Path, connections: tuple[int, ...], seconds: int) -> None:
    _wrk(url, script, 16, 2)  # warm
    for count in connections:
        figures.setdefault(side, {}).setdefault(count, []).append(_wrk(url, script, count, seconds))


def _wrk(url: str, script: Path, connections: int, seconds: int) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"{url}: {text}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found is not None, text
    return {"requests_per_s": float(found[1]), "p50_ms": _percentile(text, 50), "p99_ms": _percentile(text, 99)}


def _percentile(text: str, percent: int) -> float:
    found = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s)\s*$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1]) * {"us": 0.001, "ms": 1, "s": 1000}[found[2]]


TROUBLE = '''
import asyncio, json, os, shutil, signal, sys, time
from pathlib import Path
import aiohttp, psutil
from serve.local import running

bundle, new, image, port = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_bytes(), {port}
args = dict(bundles=[str(bundle)], replicas=2, threads=1, watch_seconds=0.5)

async def load(seconds, act):
    """64 connections, each asking again as soon as it is answered."""
    url, rows, end = f"http://127.0.0.1:{{port}}/v1/predict", [], time.monotonic() + seconds
    async def one(session):
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                async with session.post(url, data=image) as answer:
                    await answer.read()
                    rows.append((begun, time.monotonic(), answer.status))
            except Exception as error:
                rows.append((begun, time.monotonic(), type(error).__name__))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64), timeout=aiohttp.ClientTimeout(30)) as session:
        tasks = [asyncio.create_task(one(session)) for _ in range(64)]
        await asyncio.sleep(3)
        acted = time.monotonic()
        await asyncio.to_thread(act)
        await asyncio.gather(*tasks)
    good = sorted(end for _, end, status in rows if status == 200)
    bad = [(end - begun, status) for begun, end, status in rows if status != 200]
    return dict(
        sent=len(rows), failed=len(bad), failures=sorted({{str(status) for _, status in bad}}),
        longest_gap_s=round(max(b - a for a, b in zip(good, good[1:])), 3),
        slowest_failure_s=round(max((seconds for seconds, _ in bad), default=0), 3),
        slowest_answer_s=round(max(end - begun for begun, end, _ in rows), 3),
    )

def swap():
    bundle.rename(bundle.with_name("old")); new.rename(bundle)

def kill():
    victims = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]
    os.kill(victims[0].pid, signal.SIGKILL)

with running(args, "127.0.0.1", port, cpus=8) as service:
    result = {{"swap": asyncio.run(load(10, swap))}}
    result["scale_down"] = asyncio.run(load(20, lambda: service.deploy({{**args, "replicas": 1}})))
    service.deploy(args)
    time.sleep(3)
    result["kill"] = asyncio.run(load(12, kill))
print(json.dumps(result))
'''


def _trouble(bundle: Path, folder: Path) -> dict:
    """64 connections while the model is swapped, while one of two replicas is taken away, while one is killed."""
    (folder / "trouble.py").write_text(TROUBLE.format(port=PORT + 40))
    new = make_bundle(folder / "new", seed=1)
    command = [sys.executable, str(folder / "trouble.py"), str(bundle), str(new), str(folder / "raw-0")]
    top = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": top})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(main)
