"""The page in a real browser, on the service and as a static folder: what people see, with the service's numbers."""

from __future__ import annotations

import base64
import dataclasses
import functools
import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cibl_ray.bundle.card import open_bundle
from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import UserError
from pipelines.pixels import EvalRule, decode
from serve import web
from serve.page.ort import has_webgpu, installed, pinned
from tests.serve.browsers import SOFTWARE_GPU, Tab, executable
from tests.serve.conftest import encoded, png, serving, until
from tests.serve.pictures import picture_files

pytestmark = pytest.mark.browser
needs_ort = pytest.mark.skipif(installed() != pinned(), reason="onnxruntime-web is not installed: make web")

OPEN = "#places input"  # is there once the models are known
RULES = {
    "as it is": EvalRule(64),
    "ImageNet": EvalRule(224, 0.875),
    "stored square": EvalRule(32, 1.0, 48),
    "stored with a longest side": EvalRule(64, 0.875, None, 200),
    "of photographs": EvalRule(96, 0.875, None, 200, interpolation="bicubic"),
}
DECODE = """async ([text, rule]) => {
  const { decode, applyRule } = await import(new URL("page/pixels.js", location));
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const { data } = applyRule(await decode(new Blob([bytes]), 4e7), rule);
  return btoa(Array.from(data, (value) => String.fromCharCode(value)).join(""));
}"""
APPLY = """async ([text, width, height, rule]) => {
  const { applyRule } = await import(new URL("page/pixels.js", location));
  const data = Uint8ClampedArray.from(atob(text), (letter) => letter.charCodeAt(0));
  const image = applyRule({ data, width, height }, rule);
  return btoa(Array.from(image.data, (value) => String.fromCharCode(value)).join(""));
}"""


def upload(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def wait(tab: Tab, condition: str) -> None:
    """Wait until an expression is true. Playwright's own way is an eval, which the page's policy forbids."""
    until(lambda: tab.page.evaluate(condition), 60)


def pixels_of(tab: Tab, script: str, argument: list[Any], rule: EvalRule) -> np.ndarray:
    """uint8 (S, S, 3) that the browser makes by a rule."""
    content = base64.b64decode(tab.page.evaluate(script, [*argument, rule_of(rule)]))
    return np.frombuffer(content, np.uint8).reshape(rule.size, rule.size, 3)


def shown(tab: Tab) -> list[list[tuple[int, float]]]:
    """(class, probability) of the bars of each answer, the newest first."""
    wait(tab, "!document.querySelector('.result .body > .hint')")
    return tab.page.eval_on_selector_all(
        ".result",
        "all => all.map(one => [...one.querySelectorAll('.bars li')].map(bar => [+bar.dataset.index, +bar.dataset.share]))",
    )


def rule_of(rule: EvalRule) -> dict[str, Any]:
    return dataclasses.asdict(rule)


@pytest.fixture
def opened(tab: Tab, simple: Any) -> Tab:
    """The service's page, ready for images."""
    tab.page.goto(f"http://127.0.0.1:{simple.port}/")
    tab.page.wait_for_selector(OPEN)
    return tab


def drop(tab: Tab, data: bytes, kind: str = "drop") -> None:
    """Drop or paste a file on the page."""
    tab.page.evaluate(
        """([text, kind]) => {
          const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "thrown.png", { type: "image/png" }));
          const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
            : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
          document.body.dispatchEvent(event);
        }""",
        [base64.b64encode(data).decode(), kind],
    )


def test_drop_and_slider_rank_as_the_server_does(opened, simple):
    data = encoded("PNG", 11)
    drop(opened, data)
    for shift in (0, 0.75, 2):
        opened.page.locator("#shift").fill(str(shift))
        wait(opened, f"document.querySelector('#shift-value').textContent === '{shift:.2f}'")
        before = len(opened.requests)
        (bars,) = shown(opened)
        (asked,) = simple.ask("POST", f"/v1/predict?top_k=5&tail_shift={shift}", data).json()["predictions"]
        assert [index for index, _ in bars] == [row["index"] for row in asked["top"]]
        assert [share for _, share in bars] == pytest.approx([row["probability"] for row in asked["top"]], abs=1e-4)
        assert len(opened.requests) == before  # the browser ranks by itself
        best = opened.page.locator(".bars li").first
        said = f"thrown.png: {best.locator('.label').inner_text()}, {best.locator('.prob').inner_text()}."
        assert opened.page.inner_text("#status") == said
    drop(opened, encoded("PNG", 12), "paste")
    opened.page.wait_for_selector(".result:nth-child(2)")
    assert len(shown(opened)) == 2
    opened.page.get_by_role("button", name="Remove thrown.png").first.click()
    assert len(shown(opened)) == 1
    assert opened.hosts() == {f"127.0.0.1:{simple.port}"}
    assert opened.problems == []


def test_measured_accuracy_moves_with_the_slider(opened, bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    opened.page.locator("#shift").fill("1.5")
    wait(opened, "document.querySelector('#shift-value').textContent === '1.50'")
    row = opened.page.locator(".measured tr", has_text="medium")
    assert row.locator("td").first.inner_text() == f"{100 * manifest['tail_shift']['1.5']['medium']:.1f} %"
    change = 100 * (manifest["tail_shift"]["1.5"]["medium"] - manifest["tail_shift"]["0.0"]["medium"])
    assert float(row.locator("td").nth(1).inner_text().replace("−", "-")) == pytest.approx(change, abs=0.051)


def test_measured_shifts_count_from_the_bundles_own(opened):
    """A bundle that was exported with a tail shift has it without asking."""
    script = """async () => {
      const { measuredPoints } = await import(new URL("page/shift.js", location));
      return measuredPoints({ default_tail_shift: 0.5, tail_shift: { "1.0": { few: 0.4 }, "0.0": { few: 0.1 } } });
    }"""
    assert opened.page.evaluate(script) == [{"few": 0.1, "shift": -0.5}, {"few": 0.4, "shift": 0.5}]


@pytest.mark.parametrize(
    ("default", "slider", "words"),
    [
        (0.0, ("0", "2"), ["as trained", "favours rare classes"]),
        (-0.5, ("0", "2.5"), ["as exported", "favours rare classes"]),
        (0.125, ("-0.12", "1.87"), ["as trained", "favours rare classes"]),
        (3.0, ("-3", "0"), ["as trained", "as exported"]),
    ],
)
def test_the_slider_spans_what_was_measured(opened, bundle, default, slider, words):
    """Of a bundle with any shift by default; 0 is what the bundle answers, and the slider reaches it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    rows = {**manifest["tail_shift"], str(default): {**manifest["tail_shift"]["0.0"], "overall": 0.125}}
    changed = {**manifest, "default_tail_shift": default, "tail_shift": rows}
    opened.page.route("**/manifest.json", lambda route: route.fulfill(json=changed))
    opened.page.reload()
    opened.page.wait_for_selector(OPEN)
    field = opened.page.locator("#shift")
    assert (field.get_attribute("min"), field.get_attribute("max")) == slider
    assert opened.page.locator("#shift-ends span").all_inner_texts() == words
    for end in slider:
        field.fill(end)
        wait(opened, f"document.querySelector('#shift-value').textContent === '{float(end):.2f}'")
        assert opened.page.locator(".measured tr", has_text="overall").locator("td").first.inner_text() != "–"
        assert 42 <= float(opened.page.locator("svg .now").get_attribute("x1")) <= 350  # within the picture
    field.fill("0")
    wait(opened, "document.querySelector('#shift-value').textContent === '0.00'")
    assert opened.page.locator(".measured tr", has_text="overall").locator("td").all_inner_texts() == ["12.5 %", "0.0"]
    assert opened.page.locator("svg circle").count() == 4
    assert opened.problems == []


def test_no_accuracy_where_none_was_measured(opened, bundle):
    """A bundle of an earlier version, whose own shift lies below those that were measured."""
    manifest = {**json.loads((bundle / "manifest.json").read_text()), "default_tail_shift": -0.5}
    opened.page.route("**/manifest.json", lambda route: route.fulfill(json=manifest))
    opened.page.reload()
    opened.page.wait_for_selector(OPEN)
    row = opened.page.locator(".measured tr", has_text="overall")
    assert row.locator("td").all_inner_texts() == ["–", "–"]
    opened.page.locator("#shift").fill("0.5")
    wait(opened, "document.querySelector('#shift-value').textContent === '0.50'")
    assert row.locator("td").all_inner_texts() == [f"{100 * manifest['tail_shift']['0.0']['overall']:.1f} %", "–"]
    assert opened.problems == []


def test_the_model_card(opened, bundle):
    manifest = open_bundle(bundle).manifest
    card = opened.page.locator("#card")
    assert manifest["files"]["model.onnx"] in card.inner_text()
    table = card.locator(".tall table")
    assert table.locator("tbody tr").count() == len(manifest["classes"])
    table.get_by_role("button", name="Accuracy").click()
    accuracy = [float(text.split()[0]) for text in table.locator("tbody td:last-child").all_inner_texts()]
    assert accuracy == sorted(accuracy)
    assert accuracy == [round(100 * share, 1) for share in sorted(manifest["per_class"]["fp32"])]
    card.get_by_label("Find").fill(manifest["classes"][3])
    assert table.locator("tbody tr").count() == 1
    line = card.locator("pre").first.inner_text()
    assert line.startswith("curl --data-binary @image.jpg 'http://127.0.0.1:")
    with opened.page.expect_download() as download:
        card.get_by_role("link", name="Download digits.fp32.onnx").click()
    assert Path(download.value.path()).read_bytes() == (bundle / "model.onnx").read_bytes()


def test_mistakes_are_sentences(tab, bundle):
    with serving([bundle], max_bytes=60_000, max_pixels=1_000_000) as server:
        tab.page.goto(f"http://127.0.0.1:{server.port}/")
        tab.page.wait_for_selector(OPEN)
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        for name, data, sentence in (
            ("large.png", buffer.getvalue(), "large.png is too large: it has 120 kB, and at most 60 kB are accepted."),
            ("notes.png", b"no image at all", "notes.png is not an image that can be read here. Save it as JPEG, PNG or WebP."),
            ("wide.png", png(2000, 2000), "wide.png cannot be read as an image: 2000x2000 pixels, 1,000,000 at most."),
            ("empty.png", b"", "empty.png is empty."),
        ):
            tab.page.set_input_files("#files", [upload(name, data)])
            tab.page.wait_for_selector(".result .problem")
            assert sentence in tab.page.locator(".result .problem").inner_text()
            tab.page.get_by_role("button", name="Remove all images").click()
    tab.page.set_input_files("#files", [upload("late.png", encoded("PNG"))])
    tab.page.wait_for_selector(".result .problem")
    assert "does not answer" in tab.page.locator(".result .problem").inner_text()


@pytest.mark.parametrize("place", ["On the service", pytest.param("In this browser, fp32", marks=needs_ort)])
def test_a_file_that_has_changed_is_to_be_chosen_again(opened, tmp_path, place):
    """A browser does not read a file that is no longer the one that was chosen."""
    opened.page.get_by_label(place).check()
    file = tmp_path / "seven.png"
    file.write_bytes(encoded("PNG", 7))
    opened.page.set_input_files("#files", file)
    assert len(shown(opened)[0]) == 5
    file.unlink()
    opened.page.locator("#model").dispatch_event("change")  # asks again
    opened.page.wait_for_selector(".result .problem")
    assert opened.page.inner_text(".result .problem") == "seven.png cannot be read any more; choose it again."


def test_a_folder_is_refused(opened, tmp_path):
    """As a desktop drops it: beside an image, which is answered."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "one.png").write_bytes(encoded("PNG", 1))
    devtools = opened.context.new_cdp_session(opened.page)
    files = {"items": [], "files": [str(tmp_path / name) for name in ("photos", "one.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 200, "data": files})
    opened.page.wait_for_selector("#problem:not([hidden])")
    assert opened.page.inner_text("#problem") == "photos is a folder. Open it, and drop the images that are in it."
    assert len(shown(opened)) == 1
    assert opened.page.inner_text("#status").startswith("one.png: ")
    assert opened.problems == []


def test_the_key_is_asked_for_and_kept_in_memory(tab, bundle, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret-key-é-鍵")  # the service compares its UTF-8 bytes
    with serving([bundle]) as server:
        tab.page.goto(f"http://127.0.0.1:{server.port}/")
        field = tab.page.locator("#key")
        field.fill("wrong")
        tab.page.get_by_role("button", name="Use this key").click()
        tab.page.wait_for_selector("#problem:not([hidden])")
        assert "does not accept this API key" in tab.page.locator("#problem").inner_text()
        field.fill("secret-key-é-鍵")
        field.press("Enter")
        tab.page.wait_for_selector(OPEN)
        assert not field.is_visible()
        tab.page.set_input_files("#files", [upload("one.png", encoded("PNG", 1))])
        assert len(shown(tab)[0]) == 5
        with tab.page.expect_download() as download:  # a plain link would be refused
            tab.page.get_by_role("link", name="Download digits.int8.onnx").click()
        assert Path(download.value.path()).read_bytes() == (bundle / "model.int8.onnx").read_bytes()
        kept = tab.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        assert not any("secret-key" in url for url in tab.requests)
        tab.page.reload()
        tab.page.wait_for_selector("#key-form:not([hidden])")
        tab.page.goto(f"http://127.0.0.1:{server.port}/docs")
        assert "/v1/predict" in tab.page.inner_text("main")


SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
LONG_NAME = "a-file-with-a-long-name-of-a-telephone-20261129.png"


def fits_a_phone(tab: Tab, address: str, scheme: str) -> None:
    """Open the page, get an answer: nothing sticks out, nothing is left out, and the colours are those that were asked for."""
    tab.page.goto(address)
    tab.page.wait_for_selector(OPEN)
    tab.page.set_input_files("#files", [upload(LONG_NAME, encoded("PNG", 2))])
    shown(tab)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert tab.page.evaluate("document.querySelector('#results').getBoundingClientRect().top < innerHeight")
    assert tab.page.evaluate("(({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth)(document.querySelector('.tall'))")
    assert re.search(r"(many|medium|few), [\d,]+ images", tab.page.locator(".bars").inner_text())
    back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")


@SCHEMES
def test_a_phone(chromium, simple, scheme):
    context = chromium.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    fits_a_phone(Tab(context), f"http://127.0.0.1:{simple.port}/", scheme)
    context.close()


def violations(tab: Tab, axe: Any) -> list[tuple[str, list[str]]]:
    """What axe's rules find on the page as it is, at a desktop's size and at a phone's."""
    found = []
    for size in (DESKTOP, PHONE):
        tab.page.set_viewport_size(size)
        rules = axe.run(tab.page).response["violations"]
        found += [(f"{rule['id']} at {size['width']}", [node["html"] for node in rule["nodes"]]) for rule in rules]
    return found


@pytest.fixture(scope="session")
def axe() -> Any:
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


@SCHEMES
def test_no_violation_of_accessibility(chromium, simple, axe, scheme):
    """The page with an answer, a mistake and the key field; the camera's window; and the routes."""
    context = chromium.new_context(viewport=DESKTOP, color_scheme=scheme, bypass_csp=True)
    tab = Tab(context)
    tab.page.goto(f"http://127.0.0.1:{simple.port}/")
    tab.page.wait_for_selector(OPEN)
    tab.page.set_input_files("#files", [upload("one.png", encoded("PNG")), upload("two.png", b"two")])
    shown(tab)
    tab.page.evaluate("document.querySelector('#key-form').hidden = false")
    found = violations(tab, axe)
    tab.page.evaluate("document.querySelector('#camera-dialog').showModal()")
    found += violations(tab, axe)
    tab.page.goto(f"http://127.0.0.1:{simple.port}/docs")
    found += violations(tab, axe)
    assert found == []
    context.close()


def test_keyboard_alone(opened):
    reached = []
    for _ in range(12):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.id || document.activeElement.getAttribute('href')"))
    assert reached[0] == "#try"
    assert {"model", "files", "shift"} <= set(reached)
    opened.page.locator("#shift").focus()
    opened.page.keyboard.press("ArrowRight")
    wait(opened, "document.querySelector('#shift-value').textContent === '0.01'")
    opened.page.locator(".tall").get_by_role("button", name="Class").focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.locator(".tall th").first.get_attribute("aria-sort") == "ascending"


def test_the_focus_goes_to_the_next_image_that_can_be_removed(opened):
    opened.page.set_input_files("#files", [upload(f"{number}.png", encoded("PNG", number)) for number in range(3)])
    shown(opened)
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    opened.page.get_by_role("button", name="Remove 1.png").focus()
    for expected in ("Remove 0.png", "Remove 2.png", "files"):  # the newest stands first
        opened.page.keyboard.press("Enter")
        assert opened.page.evaluate(focused) == expected


def test_a_photograph_from_the_camera(playwright, simple):
    """Chromium's own camera for tests, which shows a moving picture."""
    browser = playwright.chromium.launch(
        executable_path=executable(),
        args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
    )
    tab = Tab(browser.new_context())
    try:
        tab.page.goto(f"http://127.0.0.1:{simple.port}/")
        tab.page.wait_for_selector(OPEN)
        tab.page.get_by_role("button", name="Take a photograph").click()
        wait(tab, "document.querySelector('#video').videoWidth > 0")
        tab.page.get_by_role("button", name="Take the picture").click()
        tab.page.wait_for_selector(".bars")
        assert len(shown(tab)[0]) == 5
        assert tab.page.evaluate("document.querySelector('.result img').naturalWidth") >= 320
        wait(tab, "document.querySelector('#video').srcObject.getTracks().every((track) => track.readyState === 'ended')")
        # A second click while the browser still asks: no stream stays on.
        tab.page.evaluate("""() => {
          const [media, button] = [navigator.mediaDevices, document.querySelector("#camera")];
          const ask = media.getUserMedia.bind(media);
          globalThis.streams = [];
          media.getUserMedia = async (wanted) => {
            const stream = await ask(wanted);
            globalThis.streams.push(stream);
            return stream;
          };
          button.click();
          button.click();
        }""")
        wait(tab, "document.querySelector('#camera-dialog').open")
        tab.page.wait_for_timeout(300)  # a second stream would be there
        tab.page.get_by_role("button", name="Close").click()
        wait(tab, "streams.every((stream) => stream.getTracks().every((track) => track.readyState === 'ended'))")
        assert tab.problems == []
    finally:
        browser.close()


def test_several_models(tab, bundle, versions):
    """Each with its own answers and card, and commands that name it."""
    data = encoded("PNG", 7)
    with serving([bundle, versions["other"]], path_prefix="/here") as server:
        tab.page.goto(f"http://127.0.0.1:{server.port}/here")  # without the slash
        tab.page.wait_for_selector(OPEN)
        tab.page.set_input_files("#files", [upload("seven.png", data)])
        for name in ("digits", "other"):
            tab.page.locator("#model").select_option(name)
            tab.page.wait_for_selector(".bars")
            (bars,) = shown(tab)
            (asked,) = server.ask("POST", f"/here/v1/predict?model={name}&top_k=5", data).json()["predictions"]
            assert [share for _, share in bars] == pytest.approx([row["probability"] for row in asked["top"]], abs=1e-4)
            curl, edge = tab.page.locator("#card pre").all_inner_texts()
            address = f"http://127.0.0.1:{server.port}/here"
            assert curl == f"curl --data-binary @image.jpg '{address}/v1/predict?model={name}'"
            assert edge == f"python -m serve.edge {address} image.jpg --name {name}"
            with tab.page.expect_download() as download:
                tab.page.get_by_role("link", name=f"Download {name}.fp32.onnx").click()
            source = (bundle if name == "digits" else versions["other"]) / "model.onnx"
            assert Path(download.value.path()).read_bytes() == source.read_bytes()
    assert tab.problems == []


def answers_held(tab: Tab) -> list[Any]:
    """Hold back the requests for answers from now on: they are listed, and each is sent by its `continue_()`."""
    held: list[Any] = []
    tab.page.route("**/v1/predict*", lambda route: held.append(route))
    return held


def held_up(tab: Tab, held: list[Any], number: int) -> None:
    """Wait until as many requests are held back."""

    def there() -> bool:
        tab.page.evaluate("0")  # Playwright notes what has happened when it is called
        return len(held) >= number

    until(there)


def test_removed_images_are_not_sent(opened):
    held = answers_held(opened)
    opened.page.set_input_files("#files", [upload(f"{number}.png", encoded("PNG", number)) for number in range(7)])
    held_up(opened, held, 4)
    opened.page.get_by_role("button", name="Remove all images").click()
    for route in held:
        with opened.page.expect_response("**/v1/predict*"):
            route.continue_()
    opened.page.set_input_files("#files", [upload("later.png", encoded("PNG", 9))])
    held_up(opened, held, 5)
    held[4].continue_()
    wait(opened, "document.querySelector('#status').textContent.startsWith('later.png: ')")
    assert len(shown(opened)) == 1
    assert len(held) == 5  # four were under way, three waited


def test_images_added_while_all_are_asked_again_are_counted_apart(opened):
    opened.page.set_input_files("#files", [upload(f"{number}.png", encoded("PNG", number)) for number in range(2)])
    wait(opened, "document.querySelector('#status').textContent === '2 of 2 images answered.'")
    held = answers_held(opened)
    opened.page.locator("#model").dispatch_event("change")
    held_up(opened, held, 2)
    opened.page.set_input_files("#files", [upload("third.png", encoded("PNG", 3))])
    held_up(opened, held, 3)
    held[2].continue_()
    wait(opened, "document.querySelector('#status').textContent.startsWith('third.png: ')")
    for route in held[:2]:
        route.continue_()
    shown(opened)
    assert opened.page.inner_text("#status") == "2 of 2 images answered."


def test_a_group_without_classes_has_no_change(opened):
    """The table says neither a figure nor a change where nothing was measured."""
    opened.page.route("**/manifest.json", lambda route: route.fulfill(json=_without_few(route.fetch().json())))
    opened.page.reload()
    opened.page.wait_for_selector(OPEN)
    assert opened.page.locator(".measured tr", has_text="few").locator("td").all_inner_texts() == ["–", "–"]


def _without_few(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "tail_shift": {shift: {**row, "few": None} for shift, row in manifest["tail_shift"].items()}}


# The model in the browser


@needs_ort
def test_fifty_answers_equal_onnxruntimes(opened, bundle):
    opened.page.get_by_label("In this browser, fp32").check()
    files = [encoded("PNG", number, size=8 + number % 40) for number in range(100, 150)]
    opened.page.set_input_files("#files", [upload(f"{number}.png", data) for number, data in enumerate(files)])
    wait(opened, "document.querySelector('#status').textContent.startsWith('50 of 50')")
    runtime = Runtime(bundle / "model.onnx", "cpu", 1)
    images = np.stack([runtime.card.rule(decode(data)) for data in files])
    _, expected = runtime(images)
    for bars, row in zip(reversed(shown(opened)), expected, strict=True):
        assert [share for _, share in bars] == pytest.approx(row[[index for index, _ in bars]].tolist(), abs=1e-3)
        assert [index for index, _ in bars] == np.argsort(-row, kind="stable")[:5].tolist()
    assert not any("predict" in url for url in opened.requests)
    assert opened.problems == []


@needs_ort
def test_the_model_in_the_browser_behind_a_prefix(tab, bundle):
    data = encoded("PNG", 30)
    runtime = Runtime(bundle / "model.onnx", "cpu", 1)
    _, (expected,) = runtime(runtime.card.rule(decode(data))[None])
    with serving([bundle], path_prefix="/models") as server:
        tab.page.goto(f"http://127.0.0.1:{server.port}/models/")
        tab.page.wait_for_selector(OPEN)
        tab.page.get_by_label("In this browser, fp32").check()
        tab.page.set_input_files("#files", [upload("one.png", data)])
        tab.page.wait_for_selector(".bars", timeout=30_000)
        (bars,) = shown(tab)
        assert [share for _, share in bars] == pytest.approx(expected[[index for index, _ in bars]].tolist(), abs=1e-3)
    assert tab.problems == []


@pytest.mark.skipif(not has_webgpu(), reason="onnxruntime-web for WebGPU is not installed: make web")
def test_a_gpu_gives_the_same_answers(playwright, simple, bundle):
    """Where the browser has WebGPU. Its build of onnxruntime-web is loaded only when the GPU is chosen."""
    data = encoded("PNG", 30)
    runtime = Runtime(bundle / "model.onnx", "cpu", 1)
    _, (expected,) = runtime(runtime.card.rule(decode(data))[None])
    browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox", *SOFTWARE_GPU])
    tab = Tab(browser.new_context())
    try:
        tab.page.goto(f"http://127.0.0.1:{simple.port}/")
        tab.page.wait_for_selector(OPEN)
        assert not any("webgpu" in url for url in tab.requests)
        tab.page.get_by_label("On this browser's GPU, fp32").check()
        tab.page.set_input_files("#files", [upload("one.png", data)])
        tab.page.wait_for_selector(".bars", timeout=120_000)  # the shaders of a GPU in software take seconds
        (bars,) = shown(tab)
        assert [share for _, share in bars] == pytest.approx(expected[[index for index, _ in bars]].tolist(), abs=1e-3)
        assert "GPU fp32: " in tab.page.inner_text(".result")
        assert any("ort.webgpu.js" in url for url in tab.requests)
        assert tab.problems == []
    finally:
        browser.close()


@needs_ort
def test_a_model_that_is_no_longer_chosen_is_released(opened):
    """Each has a worker with its weights; also one that is left while it still loads, with images that wait for it."""

    def workers() -> int:
        opened.page.evaluate("0")  # Playwright notes what has happened when it is called
        return len([worker for worker in opened.page.workers if worker.url.endswith("/worker.js")])

    opened.page.set_input_files("#files", [upload(f"{number}.png", encoded("PNG", number)) for number in range(6)])
    shown(opened)
    for label, expected in (("fp32", 1), ("int8", 1), ("On the service", 0)):
        opened.page.get_by_label(label if expected == 0 else f"In this browser, {label}").check()
        wait(opened, "document.querySelector('#status').textContent.startsWith('6 of 6')")
        until(lambda expected=expected: workers() == expected)
    opened.page.evaluate("""() => {
      for (const place of ["fp32", "int8", "service"]) document.querySelector(`#places input[value=${place}]`).click();
    }""")
    wait(opened, "document.querySelector('#status').textContent.startsWith('6 of 6')")
    until(lambda: workers() == 0)
    assert len(shown(opened)) == 6
    assert opened.problems == []


def test_the_services_precisions(tab, bundle):
    """All that it has loaded can be chosen, and the time of each stands under the answer."""
    with serving([bundle], more_precisions=("int8",)) as service:
        tab.page.goto(f"http://127.0.0.1:{service.port}/")
        tab.page.wait_for_selector(OPEN)
        tab.page.set_input_files("#files", [upload("seven.png", encoded("PNG", 7))])
        for precision in ("fp32", "int8"):
            tab.page.get_by_label(f"On the service ({precision})").check()
            wait(tab, f"document.querySelector('.result').innerText.includes('service {precision}: ')")
            text = tab.page.inner_text(".result")
            (times,) = re.findall(rf"service {precision}: ([\d.]+) ms \(whole request ([\d.]+) ms\)", text)
            assert 0 < float(times[0]) <= float(times[1])
            query = f"/v1/predict?top_k=5&precision={precision}"
            (asked,) = service.ask("POST", query, encoded("PNG", 7)).json()["predictions"]
            (bars,) = shown(tab)
            assert [share for _, share in bars] == pytest.approx([row["probability"] for row in asked["top"]], abs=1e-4)
    assert tab.problems == []


@needs_ort
def test_onnxruntime_web_gives_the_log_prior(opened, bundle):
    """So that pages of other people shift by themselves, without knowing the training counts."""
    found = opened.page.evaluate(
        """async (path) => {
          const ort = await import(new URL("page/ort/ort.wasm.js", location));
          const folder = new URL("page/ort/", location).href;
          const name = `${folder}ort-wasm-simd-threaded`;
          ort.env.wasm.wasmPaths = { mjs: `${name}.js`, wasm: `${name}.wasm` };
          ort.env.wasm.numThreads = 1;
          const bytes = new Uint8Array(await (await fetch(path)).arrayBuffer());
          const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
          const images = new ort.Tensor("uint8", new Uint8Array(2 * 16 * 16 * 3), [2, 16, 16, 3]);
          const { log_prior } = await session.run({ images });
          return [session.inputNames, session.outputNames, Array.from(log_prior.data)];
        }""",
        "/v1/models/digits/fp32.onnx",
    )
    counts = np.array(open_bundle(bundle).card.train_counts)
    assert found[:2] == [["images"], ["logits", "probabilities", "log_prior", "embedding"]]
    assert found[2] == pytest.approx(2 * np.log(counts / counts.sum()).tolist(), abs=1e-6)


@needs_ort
def test_a_bundle_of_an_earlier_version(tab, earlier):
    """Its file has the input `tail_shift`, which onnxruntime-web cannot feed: the page shifts by itself."""
    with serving([earlier / "bundle"]) as service:
        tab.page.goto(f"http://127.0.0.1:{service.port}/")
        tab.page.wait_for_selector(OPEN)
        for place in ("On the service", "In this browser, fp32"):
            tab.page.get_by_label(place).check()
            tab.page.set_input_files("#files", [upload("seven.png", encoded("PNG", 7))])
            tab.page.locator("#shift").fill("0.75")
            wait(tab, "document.querySelector('#shift-value').textContent === '0.75'")
            (asked,) = service.ask("POST", "/v1/predict?top_k=5&tail_shift=0.75", encoded("PNG", 7)).json()["predictions"]
            bars = shown(tab)[0]
            assert [index for index, _ in bars] == [row["index"] for row in asked["top"]]
            assert [share for _, share in bars] == pytest.approx([row["probability"] for row in asked["top"]], abs=1e-3)
    assert tab.problems == []


def test_resizing_gives_pillows_pixels(opened):
    """Every pixel, over many sizes: wide, tall, enlarged and reduced."""
    random = np.random.default_rng(0)
    for number in range(24):
        height, width = random.integers(20, 260, 2)
        rule = list(RULES.values())[number % len(RULES)]
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        got = pixels_of(opened, APPLY, [base64.b64encode(image.tobytes()).decode(), int(width), int(height)], rule)
        np.testing.assert_array_equal(got, rule(Image.fromarray(image)), err_msg=f"{width}x{height}, {rule}")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # one has damaged EXIF data
def test_files_of_all_kinds_give_the_services_pixels(opened, photos):
    for name, data in picture_files(photos[0]).items():
        for words in ("as it is", "stored with a longest side", "of photographs"):
            got = pixels_of(opened, DECODE, [base64.b64encode(data).decode()], RULES[words])
            apart = np.abs(got.astype(int) - RULES[words](decode(data))).max()
            assert apart <= 1, f"{name}, {words}: {apart}"  # 0 with Debian's Chromium; another build may decode otherwise


@needs_ort
def test_values_that_a_browser_cannot_keep_are_refused(opened):
    """12 bits in a PNG of 16: the browser's 8 would be black."""
    buffer = io.BytesIO()
    Image.fromarray((np.arange(400, dtype=np.uint16) * 10).reshape(20, 20)).save(buffer, "PNG")
    opened.page.get_by_label("In this browser, fp32").check()
    opened.page.set_input_files("#files", [upload("scan.png", buffer.getvalue())])
    opened.page.wait_for_selector(".result .problem")
    assert "scan.png has 16-bit values" in opened.page.locator(".result .problem").inner_text()


def test_the_checksum_without_a_secure_context(opened):
    """Browsers have SHA-256 on https and localhost alone."""
    import hashlib

    for length in (0, 1, 55, 56, 63, 64, 65, 1000, 100_000):
        data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
        script = """async (text) => {
          const { plain } = await import(new URL("page/sha256.js", location));
          const digest = plain(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
          return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
        }"""
        assert opened.page.evaluate(script, base64.b64encode(data).decode()) == hashlib.sha256(data).hexdigest(), length


# The static folder


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("host") / "some" / "where"
    table = web.write([bundle], out)
    assert "onnxruntime-web's WebAssembly" in table
    assert table in (out / "README.md").read_text()
    return out


@pytest.fixture
def host(folder: Path) -> Iterator[tuple[http.server.ThreadingHTTPServer, str]]:
    """A plain file server; the folder lies two levels below its root."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder.parent.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}/some/where/"
        server.shutdown()
        thread.join()


@needs_ort
def test_a_static_folder_works_without_a_service_and_offline(tab, host, bundle):
    server, address = host
    data = encoded("PNG", 30)
    runtime = Runtime(bundle / "model.onnx", "cpu", 1)
    _, (expected,) = runtime(runtime.card.rule(decode(data))[None])

    def answers() -> None:
        tab.page.wait_for_selector(OPEN)
        tab.page.set_input_files("#files", [upload("one.png", data)])
        tab.page.wait_for_selector(".bars", timeout=30_000)
        (bars,) = shown(tab)
        assert [share for _, share in bars] == pytest.approx(expected[[index for index, _ in bars]].tolist(), abs=1e-3)

    tab.page.goto(address)
    answers()
    tab.page.evaluate("navigator.serviceWorker.ready.then(() => undefined)")
    wait(tab, "navigator.serviceWorker.controller !== null")
    tab.page.reload()
    answers()
    assert tab.page.evaluate("crossOriginIsolated")  # the worker isolates the page, so that threads may be used
    assert tab.hosts() == {address.split("/")[2]}
    assert tab.problems == []
    tab.context.set_offline(True)
    server.shutdown()
    tab.page.reload()
    answers()
    server_thread = threading.Thread(target=server.serve_forever)  # so that the fixture can end it
    server_thread.start()


@needs_ort
@SCHEMES
def test_a_static_folder_on_a_phone_and_for_everyone(chromium, host, axe, scheme):
    """As the service's page: at a phone's size, in both schemes, without violation of accessibility."""
    context = chromium.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True, bypass_csp=True)
    tab = Tab(context)
    fits_a_phone(tab, host[1], scheme)
    tab.page.set_input_files("#files", [upload("two.png", b"two")])
    shown(tab)
    assert violations(tab, axe) == []
    context.close()


@needs_ort
def test_a_changed_model_is_not_used(chromium, host, folder):
    """Neither by the page, nor kept by the service worker."""
    model = folder / "models" / "digits" / "fp32.onnx"
    content = model.read_bytes()
    context = chromium.new_context(service_workers="block")
    tab = Tab(context)
    try:
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        tab.page.goto(host[1])
        tab.page.wait_for_selector(OPEN)
        tab.page.set_input_files("#files", [upload("one.png", encoded("PNG"))])
        tab.page.wait_for_selector(".result .problem", timeout=30_000)
        assert "is not the one that its manifest names" in tab.page.locator(".result .problem").inner_text()
    finally:
        model.write_bytes(content)
        context.close()


@needs_ort
def test_a_half_copied_version_does_not_replace_the_whole_one(tab, host, folder):
    """The service worker of a new version stays out while a file of it is still the old one."""
    _, address = host
    tab.page.goto(address)
    tab.page.wait_for_selector(OPEN)
    wait(tab, "navigator.serviceWorker.controller !== null")
    script = folder / web.WORKER
    content = script.read_text()
    digest = json.loads(content[content.index("{") : content.index("}") + 1])["page/page.js"]
    try:
        script.write_text(content.replace(digest, "0" * 64).replace('const VERSION = "', 'const VERSION = "new'))
        states = tab.page.evaluate(
            """async () => {
              const registration = await navigator.serviceWorker.getRegistration();
              await registration.update().catch(() => {});
              const coming = registration.installing;
              if (coming) await new Promise((resolve) => coming.addEventListener("statechange", resolve, { once: true }));
              const kept = (await caches.keys()).filter((name) => !name.includes(" new"));
              return [coming?.state, registration.active.state, kept.length];
            }"""
        )
        assert states == ["redundant", "activated", 1]
    finally:
        script.write_text(content)


def little_room(tab: Tab, address: str) -> None:
    """Let the browser keep a thousand bytes of a host."""
    host = "/".join(address.split("/")[:3])
    tab.context.new_cdp_session(tab.page).send("Storage.overrideQuotaForOrigin", {"origin": host, "quotaSize": 1000})


@needs_ort
def test_a_file_that_there_is_no_room_for_is_used_all_the_same(tab, host):
    """A model that is loaded when it is chosen, on a device whose storage is full."""
    tab.page.goto(host[1])
    wait(tab, "navigator.serviceWorker.controller !== null")
    little_room(tab, host[1])
    tab.page.get_by_label("In this browser, int8").check()
    tab.page.set_input_files("#files", [upload("one.png", encoded("PNG", 30))])
    assert len(shown(tab)[0]) == 5
    names = "caches.keys().then(async ([name]) => (await (await caches.open(name)).keys()).map(({ url }) => url))"
    kept = tab.page.evaluate(names)
    assert f"{host[1]}models/digits/fp32.onnx" in kept
    assert f"{host[1]}models/digits/int8.onnx" not in kept
    assert tab.problems == []


@needs_ort
def test_without_room_for_the_page_it_is_not_installed(tab, host):
    little_room(tab, host[1])
    tab.page.goto(host[1])
    state = tab.page.evaluate(
        """async () => {
          const { installing } = await navigator.serviceWorker.register("sw.js");
          await new Promise((resolve) => installing.addEventListener("statechange", resolve, { once: true }));
          return installing.state;
        }"""
    )
    assert state == "redundant"


@needs_ort
def test_the_folder_is_refused_where_it_cannot_be_right(bundle, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists; remove it"):
        web.write([bundle], folder)
    with pytest.raises(UserError, match="two bundles have the name 'digits'"):
        web.write([bundle, bundle], tmp_path / "twice")
    monkeypatch.setattr(web, "installed", lambda: None)
    with pytest.raises(UserError, match="fetch it with npm: python -m serve.page.ort"):
        web.write([bundle], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
