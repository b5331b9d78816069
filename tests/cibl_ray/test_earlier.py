"""A run folder and a bundle that an earlier version made still open.

`earlier/a12fa95.tar.xz` was made by the commit of that name: eight epochs on long-tailed digits, its weights then thinned out
(most are 0) so that the archive is small, evaluated and exported by the same commit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import cibl_ray
from cibl_ray.bundle.card import open_bundle
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.run.checkpoint import Checkpoint, load_checkpoint
from serve.edge.model import Edge
from tests.serve.conftest import encoded, serving

IMAGES = range(60)


def here(checkpoint: Checkpoint, prepared: Path) -> Checkpoint:
    """The checkpoint with prepared data in a folder of the test's own: the run's was on another machine."""
    data = checkpoint.config.data.model_copy(update={"prepared": prepared})
    object.__setattr__(checkpoint, "config", checkpoint.config.model_copy(update={"data": data}))
    return checkpoint


def test_it_opens_and_evaluates_the_same(earlier, tmp_path):
    run = cibl_ray.open_run(earlier)
    assert len(run.history) == 8
    assert run.scores["overall"] == pytest.approx(0.6539, abs=1e-4)
    for kind in ("last", "best"):
        checkpoint = here(load_checkpoint(earlier / "checkpoints" / f"{kind}.safetensors"), tmp_path)
        scores = evaluate(checkpoint).scores
        assert scores.per_class == run.result[kind]["scores"]["per_class"]
        assert scores.loss == pytest.approx(run.result[kind]["scores"]["loss"], abs=1e-5)


def test_its_training_resumes(earlier, tmp_path):
    run = cibl_ray.open_run(earlier).resume({"train.epochs": 9, "data.prepared": str(tmp_path)}, progress=False)
    assert [row["epoch"] for row in run.history] == [*range(1, 10)]
    assert run.result["last"]["epoch"] == 9


def test_its_bundle_answers(earlier):
    """In the service and at the edge, with the accuracy that its card states."""
    with serving([earlier / "bundle"]) as service:
        answers = [service.ask("POST", "/v1/predict", encoded("PNG", number)).json() for number in IMAGES]
        asked = service.ask("POST", "/v1/predict?tail_shift=0.75&top_k=10&logits=true", encoded("PNG", 7)).json()
    edge = Edge(earlier / "bundle" / "model.onnx")
    local = [edge.classify(encoded("PNG", number))[0] for number in IMAGES]
    for answer, prediction in zip(answers, local, strict=True):
        served = answer["predictions"][0]["top"][0]
        assert served["label"] == prediction["label"]
        assert served["probability"] == pytest.approx(prediction["probability"], abs=1e-5)
    # Its file takes the shift as an input; the files of today have the log prior as an output.
    counts = np.array(edge.card.train_counts)
    (plain,) = edge.runtime(edge.pixels(encoded("PNG", 7))[None], outputs=("logits",))
    moved = plain[0] - 0.75 * np.log(counts / counts.sum())
    probabilities = np.exp(moved) / np.exp(moved).sum()
    for shifted in (asked["predictions"][0]["top"], edge.classify(encoded("PNG", 7), 10, 0.75)):
        assert [row["probability"] for row in shifted] == pytest.approx(sorted(probabilities, reverse=True), abs=1e-5)
        assert shifted[0]["index"] == probabilities.argmax()
    target = load_digits().target
    right = np.mean([prediction["label"] == str(target[number]) for number, prediction in zip(IMAGES, local, strict=True)])
    assert right > 0.5  # of ten classes; 65 % on the test split
    assert open_bundle(earlier / "bundle").card.classes == [str(digit) for digit in range(10)]
    assert json.loads((earlier / "bundle" / "manifest.json").read_text())["split"] == "test"
