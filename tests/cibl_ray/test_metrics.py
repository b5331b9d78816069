"""Known answers; empty groups have no accuracy."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from cibl_ray.evaluation.metrics import CALIBRATION_BINS, score, table
from pipelines.prepare.shots import shot_groups


def logits_for(predictions, classes, confidence=0.75):
    rest = (1 - confidence) / (classes - 1)
    probability = torch.full((len(predictions), classes), rest)
    probability[torch.arange(len(predictions)), torch.tensor(predictions)] = confidence
    return probability.log()


def test_known_answers():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    predictions = [0, 0, 1, 0, 2, 0, 0, 3]
    scores = score(logits_for(predictions, 4), labels, np.array([500, 101, 20, 19]))
    assert scores.per_class == [1.0, 0.5, 0.5, 0.5]
    assert scores.overall == scores.balanced == 0.625
    assert (scores.many, scores.medium, scores.few) == (0.75, 0.5, 0.5)
    assert (scores.head, scores.middle, scores.tail) == (1.0, 0.5, 0.5)
    assert scores.worst == 0.5
    assert scores.harmonic == pytest.approx(4 / (1 + 2 + 2 + 2))
    assert scores.calibration_error == pytest.approx(0.75 - 0.625, abs=1e-6)
    assert scores.samples == 8


def test_an_empty_group_is_none_not_zero():
    scores = score(logits_for([0, 1], 2), torch.tensor([0, 1]), np.array([5000, 300]))
    assert (scores.many, scores.medium, scores.few) == (1.0, None, None)
    assert "few" not in scores.numbers()
    assert "-" in table({"last": scores}).splitlines()[1].split()


def test_a_class_without_samples_is_none_and_left_out():
    scores = score(logits_for([0, 1], 3), torch.tensor([0, 1]), np.array([500, 300, 200]))
    assert scores.per_class == [1.0, 1.0, None]
    assert scores.many == 1.0
    assert scores.worst == 1.0


def test_a_class_never_recognised_makes_the_harmonic_mean_zero():
    assert score(logits_for([0, 0], 2), torch.tensor([0, 1]), np.array([9, 9])).harmonic == 0.0


def test_borders_of_the_groups():
    assert shot_groups(np.array([101, 100, 20, 19])) == ["many", "medium", "medium", "few"]


def test_thirds_of_ten_classes():
    counts = np.array([10, 90, 30, 40, 50, 60, 70, 80, 20, 100])
    labels = torch.arange(10)
    right = [9, 1, 7]  # the three largest
    predictions = [i if i in right else (i + 1) % 10 for i in range(10)]
    scores = score(logits_for(predictions, 10), labels, counts)
    assert (scores.head, scores.middle, scores.tail) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_scores_agree_with_torchmetrics(scale):
    torch.manual_seed(0)
    logits, labels = scale * torch.randn(2000, 7), torch.randint(0, 7, (2000,))
    scores = score(logits, labels, np.arange(1, 8))
    error = multiclass_calibration_error(logits.softmax(1), labels, num_classes=7, n_bins=CALIBRATION_BINS)
    assert scores.calibration_error == pytest.approx(float(error), abs=1e-6)
    assert scores.per_class == pytest.approx(multiclass_accuracy(logits, labels, num_classes=7, average=None).tolist())
