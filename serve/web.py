"""`python -m serve.web BUNDLE... OUT`: a static folder with the page, the models and onnxruntime-web.

Any host of static files can serve OUT, also in a sub-folder. The models run in the visitor's browser, and images stay there.
After the first visit the page works offline.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cibl_ray.bundle.card import FORMATS, MANIFEST, Bundle, file_sha256, open_bundle
from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.common.files import need_writable
from pipelines.pixels import MAX_PIXELS
from serve.page.files import INDEX, STATIC, names
from serve.page.ort import VERSION, WEBGPU, has_webgpu, installed, pinned

MAX_BYTES = 100 << 20  # of an image
WORKER = "sw.js"
_README = """# {names}

A page to try these models. They run in the visitor's browser, and images stay there. Any host of static files can serve this
folder, also in a sub-folder: `python -m http.server 8080`. Opened as a file, without a host, the page does not start: browsers
forbid it. After the first visit the page works offline.

{table}
"""


def main() -> None:
    """Parse the command line and write the folder."""
    parser = CommandParser(prog="python -m serve.web", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder written by python -m cibl_ray.export")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--no-webgpu", action="store_true", help="leave out the build for GPUs, 27 MB")
    arguments = parser.parse_args()
    print(write(arguments.bundles, arguments.out, not arguments.no_webgpu))
    print(f"{arguments.out}: try it: python -m http.server --directory {arguments.out} 8080")


def write(bundles: list[Path], out: Path, webgpu: bool = True) -> str:
    """Write a static folder.

    Args:
        bundles: Folders of exported models, whose names differ.
        out: The folder, which must not exist. It appears when it is whole.
        webgpu: Whether models can run on a visitor's GPU, too. Needs 27 MB more in the folder, if npm has fetched them.

    Returns:
        A table of its files, with sizes and reasons.

    Raises:
        UserError: A bundle cannot be used, onnxruntime-web is missing, or the folder exists.
    """
    if out.exists():
        raise UserError(f"{str(out)!r} exists; remove it, or name another folder")
    need_writable(out, f"OUT {out}", "name another folder")
    opened = [open_bundle(path) for path in bundles]
    listed = [bundle.card.name for bundle in opened]
    if twice := next((name for name in listed if listed.count(name) > 1), None):
        raise UserError(f"two bundles have the name {twice!r}; export one under another: --name")
    if installed() != pinned():
        raise UserError(f"onnxruntime-web {pinned()} is not installed; fetch it with npm: python -m serve.page.ort")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        table = _fill(part, opened, webgpu and has_webgpu())
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return table


def _fill(part: Path, bundles: list[Bundle], webgpu: bool) -> str:
    for name in sorted(names()):
        if not webgpu and _is_webgpu(name):
            continue
        to = part / (INDEX if name == INDEX else f"page/{name}")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(STATIC / name, to)
    facts = {
        "mode": "static",
        "keys": False,
        "max_bytes": MAX_BYTES,
        "max_pixels": MAX_PIXELS,
        "formats": list(FORMATS),
        "browser": True,
        "webgpu": webgpu,
    }
    (part / "page" / "config.json").write_text(json.dumps(facts))
    (part / "models.json").write_text(json.dumps({"models": [_model(part, bundle) for bundle in bundles]}, indent=1))
    files = {path.relative_to(part).as_posix(): path for path in sorted(part.rglob("*")) if path.is_file()}
    later = {name for name in files if name.endswith(".onnx") or _is_webgpu(name)} - {_first_model(bundles[0])}
    first = [name for name in files if name not in later]
    digests = {name: file_sha256(path) for name, path in files.items()}
    version = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    script = (Path(__file__).parent / "page" / WORKER).read_text()
    for mark, value in (("@VERSION@", version), ("@FILES@", json.dumps(digests, indent=1)), ("@FIRST@", json.dumps(first))):
        script = script.replace(mark, value)
    (part / WORKER).write_text(script)
    table = _table({**files, WORKER: part / WORKER}, set(first))
    names_of_models = ", ".join(bundle.card.name for bundle in bundles)
    (part / "README.md").write_text(_README.format(names=names_of_models, table=table))
    return table


def _model(part: Path, bundle: Bundle) -> dict[str, Any]:
    """Copy a bundle's models, and describe them as `/v1/models` does."""
    name = bundle.card.name
    folder = part / "models" / name
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(bundle.manifest))
    files = {}
    for precision, entry in bundle.models.items():
        shutil.copyfile(entry.path, folder / f"{precision}.onnx")
        files[precision] = {"url": f"models/{name}/{precision}.onnx", "sha256": entry.sha256, "bytes": entry.bytes}
    return {"name": name, "serves": _best(bundle), "files": files}


def _best(bundle: Bundle) -> str:
    """fp32 where the bundle has it: browsers run it fastest."""
    return "fp32" if "fp32" in bundle.models else next(iter(bundle.models))


def _is_webgpu(name: str) -> bool:
    return Path(name).name in WEBGPU.values()


def _first_model(bundle: Bundle) -> str:
    return f"models/{bundle.card.name}/{_best(bundle)}.onnx"


def _table(files: dict[str, Path], first: set[str]) -> str:
    """What makes the folder as large as it is, as a table of Markdown."""
    rows: dict[str, list[int]] = {}
    for name, path in files.items():
        content = path.read_bytes()
        row = rows.setdefault(_reason(name, first), [0, 0])
        row[0] += len(content)
        row[1] += min(len(content), len(gzip.compress(content, 6)))
    rows["all"] = [sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values())]
    lines = ["| what | MB | MB under gzip |", "|---|---|---|"]
    lines += [f"| {reason} | {size / 1e6:.2f} | {packed / 1e6:.2f} |" for reason, (size, packed) in rows.items()]
    return "\n".join(lines)


def _reason(name: str, first: set[str]) -> str:
    if _is_webgpu(name):
        return "onnxruntime-web for WebGPU (loaded if a visitor chooses the GPU)"
    if name.endswith(".wasm"):
        return "onnxruntime-web's WebAssembly (every operator of ONNX; loaded at the first visit)"
    if "/ort/" in name and not name.endswith(VERSION):
        return "onnxruntime-web's JavaScript (loaded at the first visit)"
    if name.endswith(".onnx"):
        return f"model {name} ({'loaded at the first visit' if name in first else 'loaded if it is chosen'})"
    return "the page and the manifests (loaded at the first visit)"


if __name__ == "__main__":
    run_command(main)
