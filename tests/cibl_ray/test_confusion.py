"""The confusion report names the pairs, the classes and the images that went wrong."""

import json

import numpy as np
import torch

from cibl_ray.evaluation.confusion import confusion, image_names, save_confusion
from pipelines.pixels import EvalRule

CLASSES = ["ash", "<oak>", "elm"]


def outputs():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    answers = torch.tensor([0, 1, 1, 2, 1, 0, 2, 2])
    sure = torch.tensor([3.0, 5.0, 1.0, 2.0, 3.0, 4.0, 3.0, 3.0])
    return torch.nn.functional.one_hot(answers, 3) * sure[:, None], labels


def test_pairs_classes_and_images():
    logits, labels = outputs()
    found = confusion(logits, labels, CLASSES, np.array([9, 5, 2]), [f"{row}.jpg" for row in range(8)], "test")
    assert [(pair.true, pair.predicted, pair.count, pair.share) for pair in found.pairs] == [
        ("ash", "<oak>", 2, 0.5),
        ("<oak>", "ash", 1, 0.5),
        ("ash", "elm", 1, 0.25),
    ]
    assert [(entry["class"], entry["accuracy"], entry["train_images"]) for entry in found.worst] == [
        ("ash", 0.25, 9),
        ("<oak>", 0.5, 5),
    ]
    assert [wrong["image"] for wrong in found.worst[0]["wrong"]] == ["1.jpg", "3.jpg", "2.jpg"]
    assert [wrong.image for wrong in found.disagreements] == ["1.jpg", "5.jpg", "3.jpg", "2.jpg"]
    top = found.disagreements[0]
    assert top.probability == round(float(logits[1].softmax(0)[1]), 4)
    assert top.true_probability == round(float(logits[1].softmax(0)[0]), 4)


def test_the_page_is_one_file_with_the_images(digits, tmp_path):
    count = digits.splits["test"].samples
    labels = torch.from_numpy(np.array(digits.beton("test").labels))
    logits = torch.nn.functional.one_hot((labels + (torch.arange(count) < 5)) % 10, 10).float() * 9
    save_confusion(tmp_path, digits, "test", logits, labels, EvalRule(16, square=16))
    page, content = (tmp_path / "confusion.html").read_text(), json.loads((tmp_path / "confusion.json").read_text())
    assert sum(pair["count"] for pair in content["pairs"]) == 5
    assert len(content["disagreements"]) == 5
    assert content["disagreements"][0]["image"] == image_names(digits, "test", count)[content["disagreements"][0]["row"]]
    assert page.count("data:image/jpeg;base64,") == 5 + sum(len(entry["wrong"]) for entry in content["worst"])
    assert "http" not in page


def test_names_are_escaped_and_a_perfect_network_has_nothing_to_show(digits, tmp_path):
    from dataclasses import replace

    labels = torch.from_numpy(np.array(digits.beton("test").labels))
    right = torch.nn.functional.one_hot(labels, 10).float()
    save_confusion(tmp_path, digits, "test", right, labels, EvalRule(16, square=16))
    assert "Every image is classified as labelled" in (tmp_path / "confusion.html").read_text()
    odd = replace(digits, classes=[f"<b>{name}" for name in digits.classes])
    save_confusion(tmp_path, odd, "test", right.roll(1, 1), labels, EvalRule(16, square=16))
    page = (tmp_path / "confusion.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
