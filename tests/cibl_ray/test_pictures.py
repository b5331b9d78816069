"""Pictures of a run, whatever its log holds."""

from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from cibl_ray.evaluation import pictures
from cibl_ray.evaluation.pictures import save_accuracy_by_class, save_learning_curves
from cibl_ray.training.report import _panels


def test_curves_of_a_run_that_went_on_with_another_loss(tmp_path):
    terms = ({"cross_entropy": 1.0, "contrastive": 3.0}, {"center": 1.0, "contrastive": 3.0})
    rows = [
        {"epoch": number, "train": {"accuracy": 0.5, "loss": 2.0, **more}, "rate": {"lr": 0.1}}
        for number, more in enumerate(terms, start=1)
    ]
    for each in (rows, rows[::-1]):
        save_learning_curves(tmp_path / "curves.png", each)
        assert (tmp_path / "curves.png").stat().st_size > 5000


def scores(per_class):
    known = [value for value in per_class if value is not None]
    return SimpleNamespace(per_class=per_class, overall=float(np.mean(known)), many=0.9, medium=0.5, few=None)


def drawn(monkeypatch, tmp_path, *arguments) -> Figure:
    kept = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: kept.append(figure))
    save_accuracy_by_class(tmp_path / "a.png", *arguments)
    return kept[0]


def test_names_of_classes_do_not_cover_each_other(monkeypatch, tmp_path):
    """Classes of the same accuracy and number of images share a label. Ticks are whole numbers of images."""
    names = [f"a rather long name {number}" for number in range(20)]
    counts = np.array([300, 280, 150, 140, 130, *[40] * 10, 30, 30, 22, 21, 12])
    some = scores([1.0] * 5 + [0.5] * 10 + [0.2, 0.4, 0.0, 0.0, 0.0])
    figure = drawn(monkeypatch, tmp_path, names, counts, {"last (epoch 9)": some, "best (epoch 3)": some})
    assert len(figure.axes) == 2
    for axes in figure.axes:
        labels = axes.findobj(Annotation)
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
        texts = [label.get_text() for label in labels]
        assert "a rather long nam…, a rather long nam… +8" in texts
        assert len(texts) >= 8
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "20", "50", "100", "200"]


def test_of_many_classes_the_worst_are_named(monkeypatch, tmp_path):
    names = [f"c{number}" for number in range(60)]
    accuracies = [0.9] * 57 + [0.0, 0.1, None]
    figure = drawn(monkeypatch, tmp_path, names, np.arange(1000, 400, -10), {"last (epoch 9)": scores(accuracies)})
    texts = [label.get_text() for label in figure.axes[0].findobj(Annotation)]
    assert texts[:2] == ["c57", "c58"]
    assert len(texts) <= 12


def test_one_panel_where_the_last_epoch_is_the_best():
    first, second = scores([1.0]), scores([0.5])
    both = {"last (epoch 4)": first, "best (epoch 4)": first}
    assert _panels({"last": {"epoch": 4}, "best": {"epoch": 4}}, both) == {"last and best (epoch 4)": first}
    apart = {"last (epoch 4)": first, "best (epoch 2)": second}
    assert _panels({"last": {"epoch": 4}, "best": {"epoch": 2}}, apart) == apart
