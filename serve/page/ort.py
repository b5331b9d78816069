"""`python -m serve.page.ort` (or `make web`): fetch onnxruntime-web with npm, for models that run in the browser.

package-lock.json pins version and checksum of every package. The files go to `static/ort/`; a wheel that is built afterwards
carries them. Everything else of the page works without them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipelines.common.errors import CommandParser, UserError, run_command
from serve.page.files import STATIC

ORT = STATIC / "ort"
HERE = Path(__file__).resolve().parent
# In the package's folder dist/, and here. Some hosts do not know .mjs, and a module needs the type of JavaScript.
FILES = {
    "ort.wasm.min.mjs": "ort.wasm.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}
# The build for WebGPU, which a browser loads only for the GPU.
WEBGPU = {
    "ort.webgpu.min.mjs": "ort.webgpu.js",
    "ort-wasm-simd-threaded.asyncify.mjs": "ort-wasm-simd-threaded.asyncify.js",
    "ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
}
VERSION = "version.json"
_SECONDS = 600  # for npm: some 30 MB, once


def main() -> None:
    """Fetch the files, unless they are here in the version that the lock file pins.

    Raises:
        UserError: npm is not installed, fails or takes too long, or the files cannot be written.
    """
    CommandParser(prog="python -m serve.page.ort", description=__doc__).parse_args()
    wanted = pinned()
    if installed() == wanted and has_webgpu():
        print(f"onnxruntime-web {wanted} is in {ORT}")
        return
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed; install Node.js 18 or newer (apt-get install npm), then run this again")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        # npm waits for minutes by itself where there is no network.
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=2000", "--fetch-timeout=60000"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm had not fetched onnxruntime-web after {_SECONDS} s; run this again") from error
        if done.returncode:
            told = re.sub(r"npm (?:error|ERR!)", " ", done.stderr).partition("    at ")[0]  # up to its stack
            raise UserError(f"npm could not fetch onnxruntime-web: {' '.join(told.split())[-300:]}")
        fetched = Path(folder) / "node_modules" / "onnxruntime-web" / "dist"
        try:
            ORT.mkdir(exist_ok=True)
            for name, to in {**FILES, **WEBGPU}.items():
                content = (fetched / name).read_bytes()
                if name.endswith(".mjs"):  # without its reference to a source map, which is not served
                    content = content.partition(b"//# sourceMappingURL=")[0]
                (ORT / to).write_bytes(content)
            (ORT / VERSION).write_text(json.dumps({"onnxruntime-web": wanted, "license": "MIT"}))
        except OSError as error:
            raise UserError(f"{str(ORT)!r} cannot be written: {error.strerror}; run this as its owner") from error
    print(f"onnxruntime-web {wanted}: {sum(path.stat().st_size for path in ORT.iterdir()) / 1e6:.1f} MB in {ORT}")


def pinned() -> str:
    """The version of onnxruntime-web that the lock file names."""
    lock = json.loads((HERE / "package-lock.json").read_text())
    return str(lock["packages"]["node_modules/onnxruntime-web"]["version"])


def installed() -> str | None:
    """The version of the files in `static/ort/`; None if they are not there."""
    try:
        found = json.loads((ORT / VERSION).read_text())["onnxruntime-web"]
    except (OSError, ValueError, KeyError):
        return None
    return str(found) if all((ORT / name).exists() for name in FILES.values()) else None


def has_webgpu() -> bool:
    """Whether the build for WebGPU is in `static/ort/`, too."""
    return all((ORT / name).exists() for name in WEBGPU.values())


if __name__ == "__main__":
    run_command(main)
