"""The edge client: verified, resumed, cached downloads; answers without the service, and without torch."""

import concurrent.futures
import errno
import hashlib
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from cibl_ray.bundle.card import open_bundle
from pipelines.common.errors import UserError
from pipelines.config import DataConfig
from pipelines.formats import readable_formats, readable_suffixes
from pipelines.pixels import BadImageError
from serve.decode import Limits
from serve.edge import download as downloading
from serve.edge.__main__ import main
from serve.edge.api import local_file
from serve.edge.download import download
from serve.edge.model import Edge, frames, images, listed
from tests.conftest import REPOSITORY
from tests.serve.conftest import encoded, serving


@contextmanager
def answering(answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server of ours that gives `answer(path)`: its URL, and the headers of what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join(20)


def test_downloads_once_and_answers_like_the_service(bundle, server, tmp_path):
    url = f"http://127.0.0.1:{server.port}"
    path = download(url, tmp_path, precision="int8")
    assert path.name == f"{open_bundle(bundle).models['int8'].sha256}.onnx"
    before = path.stat().st_mtime_ns
    assert download(f"{url}/v1/models/digits/int8.onnx", tmp_path) == path
    assert path.stat().st_mtime_ns == before
    path = download(url, tmp_path)
    data = encoded("PNG", 5)
    here = Edge(path).classify(data, 3, 0.7)
    there = server.ask("POST", "/v1/predict?top_k=3&tail_shift=0.7", data).json()["predictions"][0]["top"]
    assert [entry["label"] for entry in here] == [entry["label"] for entry in there]
    assert [entry["probability"] for entry in here] == pytest.approx([entry["probability"] for entry in there], abs=1e-5)


def test_a_broken_download_goes_on_and_a_false_one_is_not_kept(bundle, server, tmp_path):
    url, entry = f"http://127.0.0.1:{server.port}", open_bundle(bundle).models["fp32"]
    whole = entry.path.read_bytes()
    (tmp_path / f"{entry.sha256}.part").write_bytes(whole[:-100])
    asked = []
    true = downloading._open

    def opened(url, key, headers=None):
        asked.append(headers)
        return true(url, key, headers)

    downloading._open = opened
    try:
        assert download(url, tmp_path).read_bytes() == whole
        assert asked[-1]["Range"] == f"bytes={len(whole) - 100}-"
        other = tmp_path / "other"
        other.mkdir()
        (other / f"{entry.sha256}.part").write_bytes(b"x" * (len(whole) - 100))
        with pytest.raises(UserError, match="another checksum"):
            download(url, other)
        assert not list(other.glob("*.onnx"))
        assert download(url, other).read_bytes() == whole  # from the start
    finally:
        downloading._open = true


def test_without_the_service_what_was_downloaded_is_used(bundle, tmp_path, capsys):
    with serving([bundle]) as server:
        url = f"http://127.0.0.1:{server.port}"
        path = download(url, tmp_path)
    assert download(url, tmp_path) == path
    assert "using the model that was downloaded before" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not answer"):
        download(url, tmp_path / "empty")


def test_a_redirect_takes_the_key_to_no_other_server(tmp_path, capsys):
    with answering(lambda path: (404, {}, b"")) as (other, stolen):
        for there in (other, other.replace("127.0.0.1", "localhost"), other.replace("http", "https")):
            with (
                answering(lambda path, there=there: (302, {"location": f"{there}/v1/models"}, b"")) as (url, asked),
                pytest.raises(UserError, match=f"redirects to another server, {there};"),
            ):
                download(url, tmp_path, key="secret")
            assert asked[0]["x-api-key"] == "secret"
    assert not stolen
    assert not capsys.readouterr().err
    # On the same server a redirect is followed.
    listing = json.dumps({"models": [{"name": "a", "files": {}}]}).encode()
    moved = {"/v1/models": (302, {"location": "/moved"}, b""), "/moved": (200, {}, listing)}
    with answering(moved.__getitem__) as (url, asked), pytest.raises(UserError, match="a has no fp32 file"):
        download(url, tmp_path, key="secret")
    assert [headers["x-api-key"] for headers in asked] == ["secret", "secret"]


@pytest.mark.parametrize(
    ("url", "warned"),
    [("http://a.invalid", True), ("https://a.invalid", False), ("http://[::1]:1", False), ("http://localhost:1", False)],
)
def test_a_key_in_the_clear_is_warned_of(url, warned, tmp_path, capsys):
    with pytest.raises(UserError, match="does not answer"):
        download(url, tmp_path, key="secret")
    assert ("unencrypted" in capsys.readouterr().err) is warned


@contextmanager
def versions(*contents: bytes) -> Iterator[tuple[str, dict]]:
    """A service of ours with one model. `state` says which version it has, and what it answers instead of it."""
    state = {"version": 0, "failure": None, "listing": None}

    def answer(path):
        content = contents[state["version"]]
        if path == "/v1/models":
            entry = {"url": "/v1/models/m/fp32.onnx", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            listing = json.dumps({"models": [{"name": "m", "files": {"fp32": entry}}]}).encode()
            return state["listing"] or (200, {}, listing)
        return state["failure"] or (200, {}, content)

    with answering(answer) as (url, _):
        yield url, state


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"failure": (503, {}, b"")}, "503"),
        ({"failure": (401, {}, b'{"error": "an API key is needed"}')}, "401: an API key is needed"),
        ({"failure": (200, {"content-length": "6"}, b"ne")}, "broke off"),
        ({"failure": (200, {}, b"other!")}, "another checksum"),
        ({"listing": (401, {}, b'{"error": "an API key is needed"}')}, "401: an API key is needed"),
        ({"listing": (200, {}, b"<html>log in</html>")}, "does not answer"),
    ],
)
def test_where_a_new_version_does_not_come_the_one_before_is_used(answer, message, tmp_path, capsys):
    with versions(b"first", b"second") as (url, state):
        path = download(url, tmp_path)
        state.update(answer, version=1)
        assert download(url, tmp_path) == path
        said = capsys.readouterr().err
        assert message in said
        assert said.endswith("; using the model that was downloaded before\n")
        assert said.count("\n") == 1
        with pytest.raises(UserError, match=message):
            download(url, tmp_path / "empty")
        state.update(failure=None, listing=None)
        assert download(url, tmp_path).read_bytes() == b"second"


def test_commands_that_start_at_once_share_one_download(tmp_path):
    content = os.urandom(1 << 20)
    entry = {"url": "/v1/models/m/fp32.onnx", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    listing = json.dumps({"models": [{"name": "m", "files": {"fp32": entry}}]}).encode()
    listed, asked = threading.Barrier(4), []

    def answer(path):
        if path == "/v1/models":
            listed.wait(20)  # all of them find the cache empty
            return 200, {}, listing
        asked.append(path)
        time.sleep(0.2)
        return 200, {"content-length": str(len(content))}, content

    with answering(answer) as (url, _), concurrent.futures.ThreadPoolExecutor(4) as threads:
        paths = [future.result(30) for future in [threads.submit(download, url, tmp_path) for _ in range(4)]]
    assert len({*paths}) == len(asked) == 1
    assert paths[0].read_bytes() == content


@pytest.mark.parametrize("key", ["top\rsecret", "top\nsecret", "top\x00secret", "top\udcffsecret"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key, tmp_path, capsys):
    with pytest.raises(UserError, match="the API key .* control character") as error:
        download("http://127.0.0.1:1", tmp_path, key=key)
    assert "secret" not in str(error.value) + capsys.readouterr().err


def test_a_key_goes_as_the_service_compares_it(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "schlüssel→1")
    with serving([bundle]) as server:
        assert download(f"http://127.0.0.1:{server.port}", tmp_path, key="schlüssel→1\r\n").is_file()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"transfer-encoding": "chunked"}, b"ff\r\nabc"), "503"),
        ((200, {}, b"[" * 100_000), "recursion"),
        (
            (200, {}, b'{"models": [{"name": "m", "files": {"fp32": {"url": "/v1/", "sha256": "0", "bytes": Infinity}}}]}'),
            "infinity",
        ),
    ],
)
def test_answers_that_are_none_of_the_services_are_one_line(answer, message, tmp_path):
    with answering(lambda path: answer) as (url, _), pytest.raises(UserError, match=message):
        download(url, tmp_path)


def test_a_full_disk_leaves_the_version_before(tmp_path, capsys, monkeypatch):
    with versions(b"first", b"second") as (url, state):
        path = download(url, tmp_path)
        state["version"] = 1

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert download(url, tmp_path) == path
    assert "No space left" in capsys.readouterr().err


def test_what_no_download_names_any_more_is_removed(tmp_path):
    with versions(b"first", b"second") as (url, state), versions(b"third") as (other, _):
        first, third = download(url, tmp_path), download(other, tmp_path)
        stray, at_work = tmp_path / f"{'0' * 64}.part", tmp_path / f"{'1' * 64}.part"
        users = tmp_path / "mine.onnx"
        for file in (stray, at_work, users):
            file.write_bytes(b"x")
        for file in (first, third, stray, users):
            os.utime(file, (0, 0))
        state["version"] = 1
        second = download(url, tmp_path)
        assert {file for file in tmp_path.iterdir() if file.suffix != ".json"} == {second, third, at_work, users}
        os.utime(second, (0, 0))
        assert download(url, tmp_path) == second
        assert second.exists()


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "file:///etc/passwd", "nothing", "http://127.0.0.1:1/v1/models/../x", "http://[::1"]
)
def test_a_wrong_url_is_explained(url, tmp_path):
    with pytest.raises(UserError):
        download(url, tmp_path)


@pytest.mark.parametrize(("name", "precision"), [("birds", "fp16"), ("birds", "int8"), (None, "int8"), (None, "fp32")])
def test_a_name_or_precision_beside_a_models_file_is_refused(name, precision, tmp_path):
    url = "http://127.0.0.1:1/v1/models/digits/fp16.onnx"
    with pytest.raises(
        UserError, match=f"names another file than {name or 'digits'}, {precision}; leave out name and precision"
    ):
        download(url, tmp_path, name, precision)


def test_a_name_beside_a_file_is_refused(bundle):
    for source in (bundle, bundle / "model.onnx"):
        with pytest.raises(UserError, match="the name 'birds' chooses a model of a service"):
            local_file(source, "fp32", "birds")


class Slow(io.BytesIO):
    def read1(self, size=-1):
        return self.read(7)


def test_frames_of_a_stream():
    pictures = [encoded("JPEG", n, size=60 + n, quality=95) for n in range(5)]
    # One with a preview inside, as cameras write them.
    preview = b"\xff\xe1" + (len(pictures[0]) + 2).to_bytes(2, "big") + pictures[0]
    pictures.append(pictures[1][:2] + preview + pictures[1][2:])
    stream = b"\r\n--boundary\r\n".join([b"", *pictures, b"\xff\xd8\xff\xe0cut short"])

    assert list(frames(io.BytesIO(stream), pytest.fail)) == pictures
    assert list(frames(Slow(stream), pytest.fail)) == pictures


def test_a_large_photograph_in_a_stream_is_not_its_preview(monkeypatch):
    small, preview = encoded("JPEG", 1), encoded("JPEG", 2)
    exif = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    more = b"\xff\xe2\xff\xff" + bytes(65533)
    large = small[:2] + 280 * more + exif + small[2:]
    assert len(large) > 17 << 20
    stream = small + large + b"--boundary" + small
    assert list(frames(io.BytesIO(stream), pytest.fail)) == [small, large, small]
    # Above the limit it is left out, with one line, and what follows is read.
    monkeypatch.setattr("serve.edge.model._WHOLE", 16 << 20)
    monkeypatch.setattr("serve.edge.model._CHUNK", 10_007)
    lines: list[str] = []
    assert list(frames(io.BytesIO(stream), lines.append)) == [small, small]
    assert lines == ["error: -: a JPEG image of more than 16,777,216 bytes is left out; give it as a file"]


def test_a_number_of_bytes_in_quotes_is_a_number(tmp_path):
    entry = {"url": "/v1/models/m/fp32.onnx", "sha256": hashlib.sha256(b"whole").hexdigest(), "bytes": "5"}
    listing = json.dumps({"models": [{"name": "m", "files": {"fp32": entry}}]}).encode()
    with answering(lambda path: (200, {}, listing if path == "/v1/models" else b"whole")) as (url, _):
        assert download(url, tmp_path).read_bytes() == b"whole"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--tail-shift", value] for value in ("nan", "inf", "1e39", "100.5", "-101", "much")),
        *([option, value] for option in ("--top", "--threads") for value in ("0", "-1", "1.5", "all", "100000")),
        ["--unknown"],
        ["--precision", "int4"],
    ],
)
def test_wrong_arguments_are_one_line(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["edge", "model.onnx", *arguments])
    with pytest.raises(UserError, match=f"{arguments[0]}.*; see python -m serve.edge --help") as error:
        main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "module", "advice"),
    [("onnxruntime", "serve.edge", "pip install onnxruntime"), ("ray", "serve", "pip install 'cibl-ray[serve]'")],
)
def test_a_missing_package_is_one_line(missing, module, advice, bundle):
    program = f"""
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
sys.argv = [{module!r}, {str(bundle / "model.onnx" if module == "serve.edge" else bundle)!r}]
import runpy
runpy.run_module({module!r}, run_name='__main__', alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not installed; this command needs: {advice}\n"


def told(names: list[str], stdin: bytes = b"") -> tuple[list[str], list[str]]:
    """(places of the images, lines)."""
    lines: list[str] = []
    places = listed(names, lines.append)
    return [place for place, _ in images(places, io.BytesIO(stdin), lines.append)], lines


def test_files_of_a_folder_that_are_left_out_are_told(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name in ("a.png", "folder.jpg/b.JPG", "c.gif", "d.TIFF", "e.heic", "f.HEIC", "notes.txt", "noending"):
        (tmp_path / name).write_bytes(name.encode())
    found, lines = told([str(tmp_path)])
    heif = [] if ".heic" not in readable_suffixes() else ["e.heic", "f.HEIC"]
    assert found == [str(tmp_path / name) for name in ("a.png", "c.gif", "d.TIFF", *heif, "folder.jpg/b.JPG")]
    if not heif:
        text = "2 .heic, 1 .txt, 1 without ending, not among the endings of images; for HEIC: pip install 'cibl-ray[heic]'"
        assert lines == [f"left out of {str(tmp_path)!r}: {text}"]


@pytest.mark.parametrize(
    ("names", "stdin", "found", "line"),
    [
        (["EMPTY"], b"", [], "error: EMPTY: no image in this folder"),
        (["TEXTS"], b"", [], "error: TEXTS: no image in this folder"),
        (["nowhere.png", "IMAGE"], b"", ["IMAGE"], "error: nowhere.png: No such file or directory"),
        (["-"], b"", [], "error: -: standard input has no image"),
        (["-"], b"hello " * 9, [], "error: -: standard input has no image"),
    ],
)
def test_a_place_without_an_image_is_an_error_and_the_rest_is_read(names, stdin, found, line, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "image.png").write_bytes(encoded("PNG"))
    places = {"EMPTY": tmp_path / "empty", "TEXTS": tmp_path / "texts", "IMAGE": tmp_path / "image.png"}

    def filled(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    got, lines = told([filled(name) for name in names], stdin)
    assert got == [filled(place) for place in found]
    assert [text for text in lines if text.startswith(filled(line))], lines


@pytest.mark.parametrize("kind", [kind for kind in readable_formats() if kind != "JPEG"])
def test_one_image_of_another_format_on_standard_input(kind, bundle):
    data = encoded(kind, 3, 200)
    ((place, got),) = images(["-"], io.BytesIO(data), pytest.fail)
    assert (place, got) == ("frame 0", data)
    edge = Edge(bundle / "model.onnx")
    assert edge.classify(got)[0]["label"] == edge.classify(encoded("PNG", 3, 200))[0]["label"]


def test_an_image_on_standard_input_is_not_cut():
    """However slowly and in whatever variant it comes, and if bytes as of a JPEG are among its own."""
    jpeg = encoded("JPEG")
    tga = bytearray(encoded("TGA", 0, 200))
    tga[100 : 100 + len(jpeg)] = jpeg
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "TIFF", big_tiff=True)
    bare = encoded("JPEG2000", no_jp2=True)
    grey = b"P5\t40 40 255\n" + (jpeg + bytes(1600))[:1600]
    for data in (bytes(tga), buffer.getvalue(), bare, grey, b"P4 1 1\n\0", b"P3 1 1 9 1 2 3"):
        assert Image.open(io.BytesIO(data)).size
        assert list(frames(io.BytesIO(data), pytest.fail)) == [data]
        assert list(frames(Slow(data), pytest.fail)) == [data]


def test_the_largest_image_is_one_setting(bundle):
    data = encoded("PNG", 0, 20)
    assert Edge(bundle / "model.onnx", max_pixels=400).classify(data)
    with pytest.raises(BadImageError, match="20x20 pixels, 399 at most"):
        Edge(bundle / "model.onnx", max_pixels=399).classify(data)
    assert Limits().max_pixels == DataConfig.model_fields["max_pixels"].default == 60_000_000


def test_warnings_of_the_decoder_are_one_line(bundle, tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x9286, 7, 0xFFFFFF, 0xFFFF) * 2
    for number in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.jpg", exif=exif)
    command = [sys.executable, "-m", "serve.edge", str(bundle), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert f"3 images were read with a warning of the decoder, such as {tmp_path / '0.jpg'}: " in done.stderr
    assert "site-packages" not in done.stderr


def test_a_cache_that_cannot_be_written_is_named(bundle, simple):
    with pytest.raises(UserError, match="the cache '/proc/nowhere' cannot be written: .*; give another folder: --cache"):
        download(f"http://127.0.0.1:{simple.port}", Path("/proc/nowhere"))


def test_a_service_under_a_prefix(bundle, tmp_path):
    whole = (bundle / "model.onnx").read_bytes()
    with serving([bundle], path_prefix="/models/here") as server:
        base = f"http://127.0.0.1:{server.port}/models/here"
        for url in (base, f"{base}/", f"{base}/v1/models/digits/fp32.onnx"):
            assert download(url, tmp_path).read_bytes() == whole


def test_a_service_behind_a_proxy_that_strips_its_prefix(tmp_path):
    entry = {"url": "/v1/models/m/fp32.onnx", "sha256": hashlib.sha256(b"whole").hexdigest(), "bytes": 5}
    listing = json.dumps({"models": [{"name": "m", "files": {"fp32": entry}}]}).encode()
    behind = {"/models/here/v1/models": listing, "/models/here/v1/models/m/fp32.onnx": b"whole"}
    with answering(lambda path: (200, {}, behind[path]) if path in behind else (404, {}, b"")) as (url, _):
        assert download(f"{url}/models/here", tmp_path).read_bytes() == b"whole"


@pytest.mark.parametrize("module", ["serve.edge", "serve"])
def test_other_packages_in_the_working_folder_do_not_matter(module, bundle, tmp_path):
    """A folder `pipelines`, as many projects have one."""
    for name in ("pipelines", "cibl_ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('another one')")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_script_works_beside_a_file_of_the_packages_name(bundle, tmp_path):
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["cibl-ray-edge"].partition(":")
    (tmp_path / "serve.py").write_text("raise SystemExit('another one')")
    (tmp_path / "image.png").write_bytes(encoded("PNG"))
    # As pip writes it: the folder of the script is first on the path, not the working folder.
    program = (
        f"import sys; from {module} import {name}; sys.argv = ['x', {str(bundle / 'model.onnx')!r}, 'image.png']; {name}()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("image.png\t")


def test_command_needs_no_torch_no_ray(bundle, tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(encoded("PNG", n))
    (tmp_path / "bad.png").write_bytes(b"no image")
    allowed = "numpy PIL onnxruntime pipelines cibl_ray serve"
    program = f"""
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        if top not in sys.stdlib_module_names and top not in {allowed.split()!r}:
            if top in ('torch', 'torchvision', 'ray', 'pydantic', 'yaml', 'tqdm', 'starlette', 'matplotlib', 'onnx', 'ffcv'):
                raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Only())
sys.argv = ['edge', *{[str(bundle / "model.onnx"), str(tmp_path / "images"), "--json", "--top", "2"]!r}]
import runpy
runpy.run_module('serve.edge', run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(line["top"]) for line in lines] == [2, 2, 2]
    command = [sys.executable, "-m", "serve.edge", str(bundle / "model.onnx"), str(tmp_path / "bad.png")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
