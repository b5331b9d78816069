"""`python -m benchmarks.web [--quick]`: the model in a browser beside onnxruntime on the same cores.

Debian's Chromium, without a window, opens a static folder (`python -m serve.web`) with a ResNet-32 at 32 px and an
EfficientNet-Lite0 at 224 px. The weights are as drawn: as fast as trained ones. The sides take turns, one image a call, medians
of the rounds. The time to the first answer goes from opening the page to the first bars: on the service's page
(`python -m serve --simple`), and in the static folder, whose model runs in the browser. Cold: the browser keeps nothing yet.
Warm: its second visit. Chromium and onnxruntime-web must be installed (`make setup` as root, `make web`).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import io
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import alternate, report
from benchmarks.serve import make_bundle, service
from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import UserError, run_command
from serve import web

LITE = {"kind": "timm", "name": "tf_efficientnet_lite0", "weights": "none"}
CALLS = {"resnet32": 40, "efficientnet_lite0": 4}  # of one side in a round
_OPEN = """async ([name, threads]) => {
  const { Api } = await import(new URL("page/api.js", location));
  const { BrowserModel } = await import(new URL("page/browser.js", location));
  const api = new Api(await (await fetch("page/config.json")).json());
  const model = (await api.models()).find((other) => other.name === name);
  const opened = await BrowserModel.open(model, "fp32", api, "wasm", threads);
  (globalThis.opened ??= {})[`${name} ${threads}`] = opened;
  return opened.threads;
}"""
_KEPT = """async () => {
  if (await navigator.serviceWorker.getRegistration()) await navigator.serviceWorker.ready;
}"""
_RUN = """async ([name, threads, size, calls]) => {
  const image = Uint8Array.from({ length: size * size * 3 }, (_, i) => (i * 2654435761) >>> 24);
  for (let i = 0; i < calls; i++) await globalThis.opened[`${name} ${threads}`].run(image, 1);
}"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.web", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rounds")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 9
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_web_"))
    try:
        bundles = {
            "resnet32": make_bundle(folder / "resnet32"),
            "efficientnet_lite0": make_bundle(folder / "lite", 0, LITE, 224, "lite"),
        }
        names = {"resnet32": "cifar", "efficientnet_lite0": "lite"}
        web.write(list(bundles.values()), folder / "out")
        with _hosted(folder / "out") as address, _chromium() as browser:
            times = 2 if arguments.quick else 7
            with service(bundles["resnet32"], "--simple") as ours:
                first = {"service": _first_answers(browser, f"{ours.url}/", times)}
            first["in_the_browser"] = _first_answers(browser, address, times)
            sides = _sides(browser, address, bundles, names)
            rates = alternate(sides, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratios = {}
    for network in bundles:
        for threads in (1, 2):
            ratio = rates[f"wasm {network} {threads}"]["median"] / rates[f"onnxruntime {network} {threads}"]["median"]
            ratios[f"{network}_wasm_over_ort_{threads}thread"] = round(ratio, 3)
    ratios["wasm_over_ort_1thread"] = min(ratios[f"{network}_wasm_over_ort_1thread"] for network in bundles)
    report(images_per_s=rates, first_answer_s=first, page_bytes=_page_bytes(), ratios=ratios)


def _page_bytes() -> dict[str, int]:
    """Bytes of the page without onnxruntime-web and models."""
    from serve.page.files import STATIC, names

    contents = [(STATIC / name).read_bytes() for name in names() if not name.startswith("ort/")]
    return {"plain": sum(map(len, contents)), "gzip": sum(len(gzip.compress(content, 6)) for content in contents)}


def _first_answers(browser: Any, address: str, times: int) -> dict[str, float]:
    """Median seconds from opening the page to the first bars, on a first visit (cold) and a second one (warm)."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(buffer, "JPEG")
    image = {"name": "image.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}
    for _ in range(times):
        context = browser.new_context()
        page = context.new_page()
        for kind in seconds:
            begun = time.perf_counter()
            page.goto(address)
            page.wait_for_selector("#places input")
            page.set_input_files("#files", [image])
            page.wait_for_selector(".bars")
            seconds[kind].append(time.perf_counter() - begun)
            page.evaluate(_KEPT)
        context.close()
    return {kind: round(statistics.median(values), 3) for kind, values in seconds.items()}


def _sides(browser: Any, address: str, bundles: dict[str, Path], names: dict[str, str]) -> dict[str, Callable[[], int]]:
    """What `alternate` runs: onnxruntime and the browser, each network, one thread and two."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#places input")
    sides: dict[str, Callable[[], int]] = {}
    for network, bundle in bundles.items():
        for threads in (1, 2):
            runtime = Runtime(bundle / "model.onnx", "cpu", threads)
            image = np.random.default_rng(0).integers(0, 256, (1, runtime.size, runtime.size, 3), dtype=np.uint8)
            got = page.evaluate(_OPEN, [names[network], threads])
            if got != threads:
                raise UserError(f"the browser gave {got} threads where {threads} were asked for; the page is not isolated")

            def native(runtime: Runtime = runtime, image: np.ndarray = image, calls: int = 8 * CALLS[network]) -> int:
                for _ in range(calls):
                    runtime(image, outputs=("logits",))
                return calls

            def wasm(network: str = network, threads: int = threads, size: int = runtime.size) -> int:
                page.evaluate(_RUN, [names[network], threads, size, CALLS[network]])
                return CALLS[network]

            sides[f"onnxruntime {network} {threads}"] = native
            sides[f"wasm {network} {threads}"] = wasm
    return sides


@contextmanager
def _chromium() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise UserError("Chromium is not installed; as root: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def _hosted(folder: Path) -> Iterator[str]:
    """A file server that isolates the page, so that threads are there from the first visit."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("cross-origin-opener-policy", "same-origin")
            self.send_header("cross-origin-embedder-policy", "require-corp")
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    run_command(main)
