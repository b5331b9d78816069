"""The tail shift is chosen on validation images, and is what evaluation, export and prediction then use."""

import csv
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cibl_ray import evaluate as evaluate_command
from cibl_ray import export as export_command
from cibl_ray import predict as predict_command
from cibl_ray.bundle.card import open_bundle
from cibl_ray.bundle.runtime import Runtime
from cibl_ray.evaluation.classify import Classifier, Unreadable, classify, from_bundle, from_checkpoint, image_files
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.evaluation.metrics import score
from cibl_ray.evaluation.tail_shift import choose_shift, shifted
from cibl_ray.exporting.make_bundle import Options, make_bundle
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.shift import chosen_shift, shift_or_auto
from pipelines.common.errors import UserError
from tests.commands import in_process
from tests.conftest import REPOSITORY


def biased(shift: float):
    """Logits that are right but for `shift` times the log-prior of a long tail."""
    counts = np.array([400, 40, 4])
    labels = torch.arange(3).repeat_interleave(50)
    margin = torch.linspace(0.1, 2, 50).repeat(3)[:, None]
    right = torch.nn.functional.one_hot(labels, 3) * margin
    return shifted(right, counts, -shift), labels, counts


@pytest.mark.parametrize("bias", [1.0, -0.5, 0.0])
def test_it_undoes_a_bias(bias):
    logits, labels, counts = biased(bias)
    chosen = choose_shift(logits, labels, counts)
    assert chosen.after == 1
    assert score(shifted(logits, counts, chosen.shift), labels, counts).balanced == 1
    assert abs(chosen.shift - bias) <= 0.05
    assert chosen.before == pytest.approx(score(logits, labels, counts).balanced)
    assert (chosen.before < 1) == (bias != 0)


def test_the_metric_decides():
    logits, labels, counts = biased(1.0)
    rare = choose_shift(logits, labels, counts, "few")
    assert rare.metric == "few"
    assert score(shifted(logits, counts, rare.shift), labels, counts).few == 1
    assert "few 0.0 -> 100.0 %" in rare.line()


def test_chance_chooses_no_shift():
    """One more right answer is chance; the same share of many is not. The error of paired images, by hand: sqrt(b + c)."""
    counts = np.array([400, 4])

    def two_classes(rare: int, others: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A shift of 0.05 log 100 = .23 turns the rare images right, which are wrong by .1; the others it leaves.
        logits = torch.tensor([[0.1, 0.0]] * rare + [[-5.0, 5.0]] * others + [[5.0, -5.0]] * (rare + others))
        return logits, torch.tensor([1] * (rare + others) + [0] * (rare + others))

    chance = choose_shift(*two_classes(4, 0), counts)  # 4 images: a gain of 4 times their share, an error of twice
    assert (chance.shift, chance.after) == (0.0, chance.before)
    assert "no shift is better beyond chance on 8 held-out images" in chance.line()
    for metric in ("balanced", "overall", "few"):
        found = choose_shift(*two_classes(5, 100), counts, metric)
        assert found.shift == 0.05
        assert found.after == 1
    assert choose_shift(*two_classes(5, 100), counts, "many").shift == 0  # no gain
    with pytest.raises(UserError, match="of a class of 'tail'; there are scores of: overall, balanced, many, few, "):
        choose_shift(*two_classes(5, 100), counts, "tail")
    for metric in ("worst", "harmonic"):
        assert choose_shift(*two_classes(40, 60), counts, metric).shift == 0.05


@pytest.mark.parametrize("metric", ["worst", "harmonic", "balanced", "few"])
def test_one_image_is_chance_for_every_metric(metric):
    logits = torch.tensor([[5.0, 0, 0]] * 40 + [[0, 5.0, 0]] * 40 + [[0.1, -5, 0.0]] + [[5.0, 0, 0]])
    labels, counts = torch.tensor([0] * 40 + [1] * 40 + [2, 2]), np.array([400, 40, 4])
    found = choose_shift(logits, labels, counts, metric)
    assert (found.shift, found.after) == (0.0, found.before)


def test_evaluate_takes_the_shift_that_the_run_chose(run_folder, tmp_path):
    """Not one of its own: a cross-validated run chose on other images, and may have no validation split."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    result = json.loads((run / "result.json").read_text())
    result["best"]["tail_shift"] = {"shift": 0.35, "metric": "balanced", "before": 0.5, "after": 0.6, "images": 777}
    (run / "result.json").write_text(json.dumps(result))
    auto = in_process(evaluate_command.main, run, "--checkpoint", "best", "--tail-shift", "auto")
    given = in_process(evaluate_command.main, run, "--checkpoint", "best", "--tail-shift", "0.35")
    line, _, table = auto.stdout.partition("\n")
    assert line == "best: tail shift 0.35: balanced 50.0 -> 60.0 % on 777 held-out images"
    assert table == given.stdout
    by_few = in_process(evaluate_command.main, run, "--checkpoint", "best", "--tail-shift", "auto", "--metric", "few")
    assert "few" in by_few.stdout.partition("\n")[0]
    assert "777" not in by_few.stdout


def test_a_runs_result_has_it_and_evaluate_finds_it_again(run_folder, tmp_path, caplog):
    result = json.loads((run_folder / "result.json").read_text())
    path = run_folder / "checkpoints" / "best.safetensors"
    assert chosen_shift(path) == result["best"]["tail_shift"]["shift"]
    assert chosen_shift(run_folder / "elsewhere.safetensors") == 0
    assert "the tail shift is 0" not in caplog.text
    assert chosen_shift(run_folder / "elsewhere.safetensors", asked=True) == 0
    assert "the tail shift is 0:" in caplog.text
    shutil.copy(path, tmp_path / "best.safetensors")  # as a sweep keeps its best trial's last epoch
    (tmp_path / "best_result.json").write_text(json.dumps({"last": {"tail_shift": {"shift": 0.7}}}))
    assert chosen_shift(tmp_path / "best.safetensors") == 0.7
    checkpoint = load_checkpoint(path)
    found = evaluate(checkpoint, tail_shift="auto")
    assert found.tail_shift is not None
    assert found.tail_shift.dump() == result["best"]["tail_shift"]
    assert found.scores == evaluate(checkpoint, tail_shift=found.tail_shift.shift).scores
    on_val = evaluate(checkpoint, split="val", tail_shift="auto")
    assert on_val.tail_shift is not None
    assert on_val.scores.balanced == pytest.approx(on_val.tail_shift.after)


@pytest.fixture(scope="module")
def skewed(run_folder, tmp_path_factory):
    """A bundle whose answers have a tail shift by default."""
    out = tmp_path_factory.mktemp("bundle") / "skewed"
    return make_bundle(run_folder / "checkpoints" / "best.safetensors", out, Options(provider="cpu", tail_shift=1.5))


def test_a_bundle_has_it_by_default(skewed, bundle):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    plain, shifted_one = Runtime(bundle / "model.onnx", "cpu"), Runtime(skewed.folder / "model.onnx", "cpu")
    assert (plain.card.tail_shift, shifted_one.card.tail_shift) == (0, 1.5)
    assert open_bundle(skewed.folder).card.tail_shift == 1.5
    images = images[:, : plain.size, : plain.size]
    (expected,) = plain(images, np.array([1.5], np.float32), ("logits",))
    (found,) = shifted_one(images, outputs=("logits",))
    assert np.allclose(found, expected, atol=1e-5)
    # A client's own shift counts from there.
    (back,) = shifted_one(images, np.array([-1.5], np.float32), ("logits",))
    assert np.allclose(back, plain(images, outputs=("logits",))[0], atol=1e-5)


def test_its_accuracy_is_measured_with_it(skewed, run_folder):
    manifest = open_bundle(skewed.folder).manifest
    checkpoint = load_checkpoint(run_folder / "checkpoints" / "best.safetensors")
    expected = evaluate(checkpoint, tail_shift=1.5).scores
    assert manifest["accuracy"]["fp32"]["balanced"] == pytest.approx(expected.balanced, abs=0.005)
    # The table of shifts counts from none.
    plain = evaluate(checkpoint).scores
    assert manifest["tail_shift"]["0.0"]["balanced"] == pytest.approx(plain.balanced, abs=0.005)
    assert manifest["tail_shift"]["1.5"]["balanced"] == manifest["accuracy"]["fp32"]["balanced"]
    card = (skewed.folder / "README.md").read_text()  # in a client's terms
    assert "The answers have a shift of 1.5 already, and yours is added to it: -1.5 is the model as trained." in card
    rows = dict(re.findall(r"^\| (-?[\d.]+) \| ([\d.]+) \|", card, re.MULTILINE))
    assert rows["0"] == f"{100 * manifest['accuracy']['fp32']['overall']:.1f}"
    assert rows["-1.5"] == f"{100 * manifest['tail_shift']['0.0']['overall']:.1f}"


@pytest.mark.parametrize("shift", [-0.5, 0.125, 3])
def test_what_it_answers_by_default_is_among_the_measured_shifts(shift, run_folder, tmp_path):
    options = Options(tail_shift=shift, provider="cpu")
    made = make_bundle(run_folder / "checkpoints" / "best.safetensors", tmp_path / "bundle", options)
    manifest = open_bundle(made.folder).manifest
    assert [*map(float, manifest["tail_shift"])] == sorted({0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, shift})
    assert manifest["tail_shift"][str(float(shift))] == manifest["accuracy"]["fp32"]
    rows = dict(re.findall(r"^\| (-?[\d.]+) \| ([\d.]+) \|", (made.folder / "README.md").read_text(), re.MULTILINE))
    assert rows["0"] == f"{100 * manifest['accuracy']['fp32']['overall']:.1f}"
    assert f"{-shift:g}" in rows


def warned_exif() -> bytes:
    """EXIF data that Pillow warns of."""
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x9286, 7, 0xFFFFFF, 0xFFFF) * 2


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "inner/c.webp"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_run_and_bundle_answer_alike(run_folder, bundle, skewed, pictures):
    files = image_files([pictures])
    assert [file.name for file in files] == ["a.jpg", "b.png", "c.webp"]
    checkpoint = load_checkpoint(run_folder / "checkpoints" / "best.safetensors")
    for mine, theirs in ((from_checkpoint(checkpoint, 0.0), bundle), (from_checkpoint(checkpoint, 1.5), skewed.folder)):
        for one, other in zip(classify(mine, files), classify(from_bundle(theirs), files), strict=True):
            assert (one.image, one.label) == (other.image, other.label)
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)


def test_a_checkpoint_answers_in_full_float32(run_folder, pictures, monkeypatch):
    """As evaluation and a bundle: on GPUs torch computes convolutions in TF32 by default."""
    seen = []
    true = HybridNetwork.classify

    def classified(network, images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return true(network, images)

    monkeypatch.setattr(HybridNetwork, "classify", classified)
    before = torch.backends.cudnn.allow_tf32
    classifier = from_checkpoint(load_checkpoint(run_folder / "checkpoints" / "best.safetensors"), 0.0)
    assert len([*classify(classifier, image_files([pictures]))]) == 3
    assert (seen, torch.backends.cudnn.allow_tf32) == ([False], before)


def test_the_command_answers_what_it_can_read(run_folder, pictures, tmp_path):
    (pictures / "d.jpg").write_bytes(b"no image")
    Image.new("RGB", (60, 60)).save(pictures / "e.png")
    Image.open(pictures / "a.jpg").save(pictures / "a.jpg", exif=warned_exif())
    command = [
        sys.executable,
        "-m",
        "cibl_ray.predict",
        str(run_folder),
        str(pictures),
        "--top",
        "2",
        "--max-pixels",
        "2000",
        "--out",
    ]
    done = subprocess.run([*command, str(tmp_path / "answers.csv")], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode != 0
    assert "d.jpg: is not an image" in done.stderr
    assert "e.png: is too large: 60x60 pixels, 2,000 at most; --max-pixels allows it" in done.stderr
    assert "2 of 5 files could not be classified" in done.stderr
    assert f"1 image was read with a warning of the decoder, such as {pictures / 'a.jpg'}: " in done.stderr
    assert "site-packages" not in done.stderr
    assert "Traceback" not in done.stderr
    rows = [*csv.DictReader((tmp_path / "answers.csv").read_text().splitlines())]
    assert [row["image"] for row in rows] == [str(pictures / name) for name in ("a.jpg", "b.png", "inner/c.webp")]
    assert {*rows[0]} == {"image", "class", "probability", "class_2", "probability_2"}
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])


def test_answers_are_kept(run_folder, pictures, tmp_path, monkeypatch):
    """Of names in any encoding, and those before Ctrl-C; what cannot be written is told first."""
    other = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "b.png", other)
    out = tmp_path / "answers.csv"
    done = in_process(predict_command.main, run_folder, other, "--out", out)
    assert done.returncode == 0, done.stderr
    assert b"caf\xe9.png" in out.read_bytes()
    out.unlink()
    done = in_process(predict_command.main, run_folder, other, "--out", tmp_path)
    assert done.returncode == 2
    assert f"error: --out {tmp_path} is a folder; name a file in it" in done.stderr

    def stopped(*arguments):
        answers = classify(*arguments)
        yield next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr("cibl_ray.evaluation.classify.classify", stopped)
    done = in_process(predict_command.main, run_folder, pictures / "a.jpg", pictures / "b.png", "--out", out)
    assert done.returncode == 130
    assert f"stopped; {out} has the answers so far" in done.stderr
    assert [row["image"] for row in csv.DictReader(out.read_text().splitlines())] == [str(pictures / "a.jpg")]


def test_more_answers_than_classes_are_all_of_them(run_folder, pictures, tmp_path, monkeypatch):
    out = tmp_path / "answers.csv"
    monkeypatch.setattr("sys.argv", ["predict", str(run_folder), str(pictures / "a.jpg"), "--top", "50", "--out", str(out)])
    predict_command.main()
    head, row = csv.reader(out.read_text().splitlines())
    assert len(head) == len(row) == 1 + 2 * 10


def test_what_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        image_files([tmp_path / "gone"])
    with pytest.raises(UserError, match="no images in"):
        image_files([tmp_path])
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "thumbnail.jpg").touch()
    assert image_files([tmp_path]) == [tmp_path / "a.png"]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"left out of {str(tmp_path)!r}: 1 .txt, not among the endings of images",
        f"left out of {str(tmp_path)!r}: folders that systems leave there: 1 @eaDir",
    ]


def test_a_decoder_that_fails_in_its_own_way_costs_one_file(pictures):
    """Pillow's AVIF decoder raises RuntimeError for a damaged file; others raise what their libraries do."""

    def rule(image: Image.Image) -> np.ndarray:
        if image.format == "PNG":
            raise RuntimeError("Failed to decode image: Missing or empty image item")
        return np.zeros((4, 4, 3), np.uint8)

    classifier = Classifier(["oak"], rule, lambda images: np.ones((len(images), 1), np.float32))
    jpeg, png, webp = classify(classifier, image_files([pictures]))
    assert jpeg.label == webp.label == "oak"
    assert isinstance(png, Unreadable)
    assert "RuntimeError: Failed to decode image" in png.problem


@pytest.mark.parametrize("text", ["nan", "inf", "100.5", "-101", "much", ""])
def test_a_shift_that_is_none_is_refused_by_each_command(text, run_folder, monkeypatch):
    for command in (evaluate_command, export_command, predict_command):
        images = [str(run_folder)] if command is predict_command else []
        monkeypatch.setattr(sys, "argv", ["command", str(run_folder), *images, f"--tail-shift={text}"])
        with pytest.raises(UserError, match="is neither 'auto' nor a number from -100 to 100"):
            command.main()


def test_the_shifts_that_are_taken(run_folder):
    assert [shift_or_auto(text) for text in ("auto", "-100", "0.5", "1e2")] == ["auto", -100, 0.5, 100]
    checkpoint = load_checkpoint(run_folder / "checkpoints" / "best.safetensors")
    for shift in (math.nan, 101.0):
        with pytest.raises(UserError, match="tail_shift = .*: a number from -100 to 100"):
            from_checkpoint(checkpoint, shift)
