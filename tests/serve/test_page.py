"""The page's routes over HTTP: what a browser loads, without a key, from nowhere else; and pages of other origins."""

from __future__ import annotations

import gzip
import json
import re
import sys

import numpy as np
import pytest

from cibl_ray.bundle.card import open_bundle
from pipelines.common.errors import UserError
from serve.page import ort
from serve.page.files import POLICY, STATIC, names
from serve.settings import check
from serve.v2 import MAX_NUMBERS
from tests.serve.conftest import encoded, serving

OWN = sorted(name for name in names() if not name.startswith("ort/"))


def test_the_page_and_all_its_files(server):
    page = server.ask("GET", "/")
    assert page.status == 200
    assert page.body == (STATIC / "index.html").read_bytes()
    for name in re.findall(r'(?:href|src)="(page/[^"]+)"', page.body.decode()):
        assert server.ask("GET", f"/{name}").status == 200, name
    script = server.ask("GET", "/page/page.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert server.ask("GET", "/page/page.js", If_None_Match=script.headers["etag"]).status == 304
    packed = server.ask("GET", "/page/page.js", Accept_Encoding="gzip, br")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == script.body
    assert server.ask("POST", "/").status == 405
    for missing in ("/page/", "/page/../files.py", "/page/%2e%2e/files.py", "/page/nothing.js"):
        assert server.ask("GET", missing).status == 404, missing


def test_the_page_loads_nothing_from_another_host(server):
    assert f'content="{POLICY}"' in (STATIC / "index.html").read_text()
    for path in ("/", "/docs", "/page/page.js"):
        assert server.ask("GET", path).headers["content-security-policy"] == f"{POLICY}; frame-ancestors 'none'"
    for name in OWN:
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+[^\s\"'`]*", (STATIC / name).read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://ns.adobe.com/xap/1.0/\\0"}, name  # names, not places
    docs = server.ask("GET", "/docs").body.decode()
    assert "<style" not in docs  # the policy forbids it
    assert re.findall(r'(?:href|src)="([^"]+)"', docs) == [
        "page/icon.svg",
        "page/page.css",
        "page/icon.svg",
        "./",
        "openapi.json",
    ]


def test_the_page_is_small(server):
    """Without onnxruntime and models: below 60 kB as a browser receives it."""
    paths = ["/", *(f"/page/{name}" for name in OWN if name != "index.html"), "/page/config.json"]
    assert sum(len(server.ask("GET", path, Accept_Encoding="gzip").body) for path in paths) < 60_000


def test_the_page_opens_without_a_key(bundle, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret")
    with serving([bundle], formats=("JPEG", "PNG"), max_pixels=1_000_000, max_request_pixels=500_000) as server:
        for path in ("/", "/docs", "/openapi.json", "/page/page.css"):
            assert server.ask("GET", path).status == 200, path
        facts = server.ask("GET", "/page/config.json").json()
        assert (facts["mode"], facts["keys"], facts["max_bytes"]) == ("service", True, 16 << 20)
        assert facts["formats"] == ["JPEG", "PNG"]
        assert facts["max_pixels"] == 500_000  # one image is a request's, too
        assert server.ask("GET", "/v1/models").status == 401
        assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 401


def test_logits_shifted_by_the_log_prior_give_what_tail_shift_gives(server, bundle):
    """What the page's slider computes, in numpy."""
    card = open_bundle(bundle).card
    prior = np.log(np.array(card.train_counts) / sum(card.train_counts))
    data = encoded("PNG", 7)
    (plain,) = server.ask("POST", "/v1/predict?logits=true", data).json()["predictions"]
    shifted = np.array(plain["logits"]) - 1.25 * prior
    expected = np.exp(shifted - shifted.max())
    expected /= expected.sum()
    (asked,) = server.ask("POST", "/v1/predict?tail_shift=1.25&top_k=10", data).json()["predictions"]
    assert "logits" not in asked
    assert [row["probability"] for row in asked["top"]] == pytest.approx(
        [expected[row["index"]] for row in asked["top"]], abs=1e-5
    )
    text = json.dumps({"images": [""], "logits": "perhaps"})
    assert server.ask("POST", "/v1/predict", text, Content_Type="application/json").status == 400


def test_an_answer_of_too_many_numbers_is_refused(server, monkeypatch):
    monkeypatch.setattr("serve.v1.MAX_NUMBERS", 9)
    for asked in ("logits=1", "top_k=2"):
        refused = server.ask("POST", f"/v1/predict?{asked}", encoded("PNG"))
        assert (refused.status, refused.json()["code"]) == (413, "too_many")
    assert server.ask("POST", "/v1/predict?top_k=1", encoded("PNG")).status == 200
    assert f"{MAX_NUMBERS:,} at most" in server.ask("GET", "/openapi.json").body.decode()


def test_pages_of_other_origins(bundle, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret")
    asks = {"Origin": "https://example.org", "Access_Control_Request_Method": "POST"}
    with serving([bundle], cors=("https://example.org", "http://localhost:3000")) as server:
        asked = server.ask("OPTIONS", "/v1/predict", Access_Control_Request_Headers="x-api-key", **asks)
        assert asked.status == 204
        assert asked.headers["access-control-allow-origin"] == "https://example.org"
        assert "POST" in asked.headers["access-control-allow-methods"]
        for name in ("x-api-key", "authorization", "content-type"):
            assert name in asked.headers["access-control-allow-headers"]
        refused = server.ask("GET", "/v1/models", Origin="https://example.org")  # an error can be read, too
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://example.org")
        answer = server.ask("GET", "/v1/models", Origin="https://example.org", X_API_Key="secret")
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert answer.headers["vary"] == "origin"
        for other in ("https://example.com", "null", "https://example.org.evil.example", "HTTPS://EXAMPLE.ORG"):
            foreign = server.ask("OPTIONS", "/v1/predict", **{**asks, "Origin": other})
            assert "access-control-allow-origin" not in foreign.headers, other
        assert server.ask("OPTIONS", "/v1/models").status == 401  # no preflight
    with serving([bundle], cors=("*",)) as server:
        everyone = server.ask("GET", "/v1/models", Origin="https://example.com", X_API_Key="secret")
        assert everyone.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origins", [("https://example.org", "http://localhost:3000"), ("*",)])
def test_pages_of_other_origins_read_haproxys_own_answers(bundle, origins):
    """A body that is too large gets its answer before a replica sees it."""
    allowed = "*" if origins == ("*",) else "https://example.org"
    with serving([bundle], "haproxy", max_bytes=1024, cors=origins) as server:
        refused = server.ask("POST", "/v1/predict", b"0" * 2000, Origin="https://example.org")
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (413, allowed)
        answer = server.ask("GET", "/v1/models", Origin="https://example.org")
        assert answer.headers["access-control-allow-origin"] == allowed
        foreign = server.ask("POST", "/v1/predict", b"0" * 2000, Origin="https://example.com")
        assert foreign.headers.get("access-control-allow-origin") == ("*" if origins == ("*",) else None)


NPM = """#!{python}
import json, os, shutil, sys, time
from pathlib import Path

flags = sys.argv[1:]
assert flags[:2] == ["ci", "--ignore-scripts"], flags
locked = json.loads(Path("package-lock.json").read_text())["packages"]
assert all("integrity" in entry for name, entry in locked.items() if name)
if os.environ["NPM"] == "offline":
    print("npm error code ENOTFOUND\\nnpm error FetchError: no such host\\nnpm error     at far (away.js:1:2)", file=sys.stderr)
    sys.exit(1)
if os.environ["NPM"] == "hangs":
    time.sleep(60)
dist = Path("node_modules/onnxruntime-web/dist")
dist.mkdir(parents=True)
for name in {names!r}:
    (dist / name).write_text(f"// {{name}}\\n//# sourceMappingURL=elsewhere")
"""


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm, and an empty folder for what it fetches."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(NPM.format(python=sys.executable, names=[*ort.FILES, *ort.WEBGPU]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(ort, "ORT", tmp_path / "ort")
    monkeypatch.setattr(sys, "argv", ["ort"])
    return program


def test_npm_fetches_what_the_lock_file_pins(npm, monkeypatch, capsys):
    monkeypatch.setenv("NPM", "works")
    ort.main()
    assert (ort.installed(), ort.has_webgpu()) == (ort.pinned(), True)
    assert (ort.ORT / "ort.wasm.js").read_text() == "// ort.wasm.min.mjs\n"
    assert capsys.readouterr().out.startswith(f"onnxruntime-web {ort.pinned()}: ")
    npm.unlink()
    ort.main()  # nothing is left to do


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("offline", "npm could not fetch onnxruntime-web: code ENOTFOUND FetchError: no such host"),
        ("hangs", "npm had not fetched onnxruntime-web after 1 s; run this again"),
        ("missing", "npm is not installed; install Node.js"),
    ],
)
def test_without_npm_or_network_one_line_says_so(npm, monkeypatch, way, sentence):
    monkeypatch.setenv("NPM", way)
    monkeypatch.setattr(ort, "_SECONDS", 1 if way == "hangs" else 60)
    if way == "missing":
        monkeypatch.setenv("PATH", str(npm.parent.parent))
    with pytest.raises(UserError) as raised:
        ort.main()
    assert str(raised.value).startswith(sentence)
    assert "away.js" not in str(raised.value)
    assert ort.installed() is None


def test_without_cors_no_other_origin_may_read(server):
    answer = server.ask("GET", "/v1/models", Origin="https://example.org")
    assert "access-control-allow-origin" not in answer.headers
    assert server.ask("OPTIONS", "/v1/models", Origin="https://example.org", Access_Control_Request_Method="GET").status == 405


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/path", "https://", "ftp://example.org", ""])
def test_an_origin_that_is_none_is_refused(bundle, origin):
    with pytest.raises(UserError, match=r"cors = .*no origin; give scheme, host and port"):
        check({"bundles": [str(bundle)], "cors": [origin]})
