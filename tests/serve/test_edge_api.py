"""`serve.edge.Model` in a program, and the command on a bundle's folder with answers in a file."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import UserError
from pipelines.formats import readable_formats
from pipelines.pixels import decode
from serve.edge import Model
from serve.edge.__main__ import main
from serve.edge.model import Edge
from tests.serve.conftest import encoded, serving


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return Model(bundle, threads=1)


def test_paths_bytes_arrays_and_images_give_the_runtimes_answers(model, bundle, tmp_path):
    data = [encoded("PNG", number) for number in range(5)]
    (tmp_path / "one.png").write_bytes(data[0])
    array = np.asarray(Image.open(io.BytesIO(data[2])))
    images = [tmp_path / "one.png", str(tmp_path / "one.png"), data[1], array, array[:, :, 0], Image.open(io.BytesIO(data[4]))]
    runtime = Runtime(bundle / "model.onnx", "cpu", 1)
    stacked = np.stack([runtime.card.rule(decode(data[number])) for number in (0, 0, 1, 2, 2, 4)])  # digits are gray
    _, expected = runtime(stacked, np.array([0.5], np.float32))
    for batch in (1, 4, 32):
        answers = model.predict(images, k=3, tail_shift=0.5, batch=batch)
        for answer, row in zip(answers, expected, strict=True):
            best = np.argsort(-row, kind="stable")[:3]
            assert [entry["index"] for entry in answer.top] == best.tolist()
            assert [entry["probability"] for entry in answer.top] == pytest.approx(row[best].tolist(), abs=1e-5)
            assert (answer.label, answer.probability) == (model.card.classes[best[0]], answer.top[0]["probability"])


def test_bad_images_are_told_and_the_others_answered(model, tmp_path):
    empty = np.zeros((0, 4, 3), np.uint8)
    answers = model.predict([b"none", encoded("PNG"), tmp_path / "gone.png", np.zeros((4, 4), np.float32), empty])
    assert [answer.problem is None for answer in answers] == [False, True, False, False, False]
    assert answers[0].label is None
    assert answers[0].probability is None
    assert "No such file" in str(answers[2].problem)
    assert answers[3].problem == "an array of float32 (4, 4); give uint8 (H, W, 3) or (H, W)"
    assert model.predict([]) == []
    for name, values in {"k": (0, "2", 1.5, None), "batch": (0, "2"), "tail_shift": (float("nan"), 101, "auto", None)}.items():
        for value in values:
            with pytest.raises(UserError, match=f"{name}={value!r}"):
                model.predict([encoded("PNG")], **{name: value})


def test_a_pillow_image_is_answered_as_its_bytes_are(model):
    """A PNG may have its EXIF data after its pixels, where Pillow finds them when it loads these."""
    data = encoded("PNG", 7)
    exif = Image.Exif()
    exif[0x0112] = 3
    content = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    part = (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    turned = saved(Image.open(io.BytesIO(data)).rotate(180), "PNG")
    for file in (data[:33] + part + data[33:], data[:-12] + part + data[-12:]):
        (of_bytes, of_image, expected) = model.predict([file, Image.open(io.BytesIO(file)), turned])
        assert of_image == of_bytes == expected
    assert model.predict([data]) != [expected]


def test_a_pillow_image_that_cannot_be_read_costs_no_other_its_answer(model):
    class Damaged(Image.Image):
        def load(self):
            raise RuntimeError("no frames")  # as Pillow's AVIF decoder does

    damaged = Damaged()
    damaged._mode, damaged._size = "RGB", (4, 3)
    digit = Image.open(io.BytesIO(encoded("PNG")))
    grey = digit.convert("LA")
    answers = model.predict([digit, damaged, "a\0b", grey.convert("La"), Image.new("HSV", (8, 8))])
    assert [answer.problem for answer in answers] == [
        None,
        "a Pillow image of mode RGB, 4x3 pixels: no frames; give it in RGB",
        r"'a\x00b': embedded null byte; give the path of a file",
        None,
        None,
    ]
    assert answers[3] == answers[0]


def in_parts() -> dict[str, bytes]:
    """Image files with much metadata, or in many parts, by name."""
    digit = Image.open(io.BytesIO(encoded("PNG")))
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * (5 << 20), zip=True)
    damaged = PngImagePlugin.PngInfo()
    damaged.add_text("parameters", "steps")
    files = {"png_of_much_text": saved(digit, "PNG", pnginfo=text)}
    files["png_of_damaged_text"] = saved(digit, "PNG", pnginfo=damaged).replace(b"steps", b"stops")
    plain = encoded("JPEG")
    files["jpeg_of_comments"] = plain[:2] + b"\xff\xfe\0\4ab" * 3000 + plain[2:]
    files["tiff_of_strips"] = saved(digit.resize((4, 9000)), "TIFF", tiffinfo={278: 1})
    return files


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["png_of_much_text", "png_of_damaged_text", "jpeg_of_comments", "tiff_of_strips"])
def test_files_that_training_reads_are_read(model, bundle, name):
    """One's own files are limited by their pixels alone."""
    data = in_parts()[name]
    expected = model.card.rule(decode(data, max_pixels=60_000_000, max_scans=None))
    assert np.array_equal(Edge(bundle / "model.onnx", threads=1).pixels(data), expected)
    (answer,) = model.predict([data])
    assert answer.problem is None


def test_the_limit_of_pixels_can_be_set(bundle):
    (small,) = Model(bundle, threads=1, max_pixels=10).predict([encoded("PNG")])
    assert "pixels, 10 at most" in str(small.problem)


def test_one_image_without_a_list_is_a_mistake_and_a_stack_is_none(model, tmp_path):
    """Else the letters of a path, or the rows of an array, would each be taken for an image."""
    gray, stack = np.zeros((16, 16), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)
    for one in ("ship.jpg", tmp_path / "ship.jpg", encoded("PNG"), stack[0], gray, Image.fromarray(gray)):
        with pytest.raises(UserError, match=r"images is one image \(.*give a list: predict\(\[IMAGE\]\)"):
            model.predict(one)
    assert [answer.problem for answer in model.predict(stack)] == [None, None]


def test_the_model_of_a_service(bundle, model, tmp_path, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret")
    with serving([bundle]) as server:
        served = Model(f"http://127.0.0.1:{server.port}", key="secret", cache=tmp_path, precision="int8")
    assert served.card.precision == "int8"
    data = encoded("PNG", 3)
    assert served.predict([data])[0].top[0]["probability"] == pytest.approx(model.predict([data])[0].probability, abs=0.1)


def test_another_precision_than_a_files_is_refused(bundle, monkeypatch, tmp_path):
    """The file decides what runs."""
    with pytest.raises(UserError, match=r"model.onnx' is fp32, not int8; give another file, or no precision"):
        Model(bundle / "model.onnx", precision="int8")
    monkeypatch.setattr(sys, "argv", ["edge", str(bundle / "model.int8.onnx"), "none.png", "--precision", "fp32"])
    with pytest.raises(UserError, match="is int8, not fp32"):
        main()
    for source, asked, got in (("model.int8.onnx", "int8", "int8"), ("model.int8.onnx", None, "int8"), ("", None, "fp32")):
        assert Model(bundle / source, precision=asked, threads=1).card.precision == got


def test_a_folder_that_is_no_bundle(tmp_path, bundle):
    with pytest.raises(UserError, match="is not a bundle"):
        Model(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a service's URL"):
        Model(tmp_path / "nowhere")


def test_the_command_on_a_bundle_writes_a_table(bundle, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(encoded("PNG", number))
    (images / "bad.png").write_bytes(b"bad")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["edge", str(bundle), str(images), "--top", "2", *arguments])
        main()

    with pytest.raises(UserError, match="1 of the images"):
        run("--out", str(tmp_path / "answers.csv"))
    assert capsys.readouterr().out == ""
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"][-5:], row["rank"]) for row in rows if not row["problem"]] == [
        (f"{number}.png"[-5:], str(rank)) for number in range(3) for rank in (1, 2)
    ]
    (bad,) = [row for row in rows if row["problem"]]
    assert bad["image"].endswith("bad.png")
    assert bad["label"] == ""
    with pytest.raises(UserError, match="1 of the images"):
        run("--out", str(tmp_path / "answers.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(line.get("top", [])) for line in lines] == [2, 2, 2, 0]
    assert "problem" in lines[3]
    by_row = [(row["label"], float(row["probability"])) for row in rows if row["rank"]]
    assert by_row == [(entry["label"], entry["probability"]) for line in lines[:3] for entry in line["top"]]
    with pytest.raises(UserError, match=r"answers.csv' exists; remove it, or name another file \(--out\)"):
        run("--out", str(tmp_path / "answers.csv"))
    with pytest.raises(UserError, match="cannot be written"):
        run("--out", str(tmp_path / "no" / "answers.csv"))
    with pytest.raises((SystemExit, UserError)):
        run("--out", str(tmp_path / "answers.xml"))


def test_a_table_takes_names_that_are_not_utf_8(bundle, tmp_path, monkeypatch):
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes(encoded("PNG"))
    monkeypatch.setattr(sys, "argv", ["edge", str(bundle), str(image), "--out", str(tmp_path / "answers.csv")])
    main()
    assert (tmp_path / "answers.csv").read_bytes().splitlines()[1].startswith(os.fsencode(image) + b",1,")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_a_folder_is(bundle, tmp_path, monkeypatch, capsys):
    """A bar with the number of images; bad ones are whole lines above it."""
    images, answers = tmp_path / "images", tmp_path / "answers.csv"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(encoded("PNG", number))
    (images / "bad.png").write_bytes(b"bad")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["edge", str(bundle), str(images), "--out", str(answers)])
    with pytest.raises(UserError, match="1 of the images"):
        main()
    text = terminal.getvalue()
    assert "| 0/4 [" in text
    assert [line for line in text.replace("\r", "\n").splitlines() if "bad.png" in line] == [
        f"{images / 'bad.png'}: 3 bytes, not of {', '.join(readable_formats())}"
    ]
    assert len(answers.read_text().splitlines()) == 1 + 4
    terminal.truncate(0)
    monkeypatch.setattr(sys, "stdout", Terminal())  # it gets the answers themselves
    monkeypatch.setattr(sys, "argv", ["edge", str(bundle), str(images / "0.png")])
    main()
    assert "0/1" not in terminal.getvalue()
    assert str(images / "0.png") in sys.stdout.getvalue()
