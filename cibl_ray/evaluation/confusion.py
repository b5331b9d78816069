"""Which classes a network confuses, and which images it disagrees with: a report for people who know the images.

RUN/confusion.html  one file, images inside     RUN/confusion.json  the same for programs
"""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.common.files import write_atomically
from pipelines.loaders.eval_loader import eval_image
from pipelines.pixels import EvalRule
from pipelines.prepare.beton import Beton
from pipelines.prepare.prepared import Prepared

PAIRS, WORST, IMAGES, DISAGREEMENTS = 20, 6, 8, 24
_THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another.

    Attributes:
        true: The class that the label names.
        predicted: The class of the answer.
        count: How many.
        share: Of all images of the true class, 0 to 1.
    """

    true: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class Wrong:
    """An image whose answer is not its label.

    Attributes:
        image: Its name in the source.
        row: Its place in the split.
        true: Its label.
        predicted: The answer.
        probability: Of the answer.
        true_probability: Of the label.
    """

    image: str
    row: int
    true: str
    predicted: str
    probability: float
    true_probability: float


@dataclass(frozen=True)
class Confusion:
    """What the report says.

    Attributes:
        split: Of the images.
        samples: How many images it has.
        pairs: The most confused pairs, most images first.
        worst: Classes of the lowest accuracy, each with its accuracy, its training images and images that went wrong.
        disagreements: The images whose answer is surest and not the label: hard, or labelled wrongly.
    """

    split: str
    samples: int
    pairs: list[Pair]
    worst: list[dict[str, Any]]
    disagreements: list[Wrong]


def confusion(
    logits: torch.Tensor, labels: torch.Tensor, classes: list[str], train_counts: np.ndarray, names: list[str], split: str
) -> Confusion:
    """Find what the report says.

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).
        classes: C names.
        train_counts: Training images of each class, (C,).
        names: N names of images; a number where the name is not known.
        split: Of the images.

    Returns:
        The content of the report.
    """
    probabilities = logits.softmax(1)
    answers, truth = probabilities.argmax(1).numpy(), labels.numpy()
    sure = probabilities.amax(1).numpy()
    of_label = probabilities.gather(1, labels[:, None])[:, 0].numpy()
    samples = np.bincount(truth, minlength=len(classes))
    wrong = np.flatnonzero(answers != truth)

    def describe(row: int) -> Wrong:
        return Wrong(
            names[row],
            row,
            classes[truth[row]],
            classes[answers[row]],
            round(float(sure[row]), 4),
            round(float(of_label[row]), 4),
        )

    counted: dict[tuple[int, int], int] = {}
    for row in wrong.tolist():
        pair = int(truth[row]), int(answers[row])
        counted[pair] = counted.get(pair, 0) + 1
    pairs = sorted(counted.items(), key=lambda item: (-item[1], -item[1] / samples[item[0][0]], item[0]))[:PAIRS]
    right = np.bincount(truth[answers == truth], minlength=len(classes))
    present = np.flatnonzero(samples)
    accuracy = {int(label): right[label] / samples[label] for label in present}
    worst = sorted((label for label in accuracy if accuracy[label] < 1), key=lambda label: (accuracy[label], label))[:WORST]
    by_disagreement = sorted(wrong.tolist(), key=lambda row: (of_label[row] - sure[row], row))
    return Confusion(
        split=split,
        samples=len(labels),
        pairs=[Pair(classes[a], classes[b], count, round(float(count / samples[a]), 4)) for (a, b), count in pairs],
        worst=[
            {
                "class": classes[label],
                "accuracy": round(float(accuracy[label]), 4),
                "train_images": int(train_counts[label]),
                "wrong": [asdict(describe(row)) for row in by_disagreement if truth[row] == label][:IMAGES],
            }
            for label in worst
        ],
        disagreements=[describe(row) for row in by_disagreement[:DISAGREEMENTS]],
    )


def save_confusion(
    folder: Path, prepared: Prepared, split: str, logits: torch.Tensor, labels: torch.Tensor, rule: EvalRule
) -> None:
    """Write confusion.json and confusion.html into a run's folder.

    Args:
        folder: The run.
        prepared: The run's images.
        split: Which of them were evaluated.
        logits: float32 (N, C), in the order of the split.
        labels: int64 (N,).
        rule: How an image becomes the network's input; the thumbnails show it.
    """
    names = image_names(prepared, split, len(labels))
    found = confusion(logits, labels, prepared.classes, prepared.train_counts, names, split)
    write_atomically(folder / "confusion.json", json.dumps(asdict(found), indent=1))
    write_atomically(folder / "confusion.html", _page(found, prepared.beton(split), rule))


def image_names(prepared: Prepared, split: str, count: int) -> list[str]:
    """The name of each image in its source, as preparing has written them; numbers where that file is gone."""
    names = prepared.names(split)
    return names if len(names) == count else [str(row) for row in range(count)]


def _page(found: Confusion, beton: Beton, rule: EvalRule) -> str:
    def picture(wrong: dict[str, Any]) -> str:
        image = Image.fromarray(eval_image(beton, wrong["row"], rule)).resize((_THUMBNAIL, _THUMBNAIL))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=80)
        source = base64.b64encode(data.getvalue()).decode()
        words = f"{wrong['predicted']} {100 * wrong['probability']:.0f} %"
        label = f"label: {wrong['true']} {100 * wrong['true_probability']:.0f} %"
        return (
            f'<figure title="{_escape(wrong["image"])}"><img alt="" width="{_THUMBNAIL}" src="data:image/jpeg;base64,{source}">'
            f"<figcaption>{_escape(words)}<br><small>{_escape(label)}</small></figcaption></figure>"
        )

    rows = "".join(
        f"<tr><td>{_escape(pair.true)}</td><td>{_escape(pair.predicted)}</td><td>{pair.count}</td>"
        f"<td>{100 * pair.share:.0f} %</td></tr>"
        for pair in found.pairs
    )
    worst = "".join(
        f"<h3>{_escape(entry['class'])}: {100 * entry['accuracy']:.0f} %, {entry['train_images']:,} training images</h3>"
        f'<div class="sheet">{"".join(map(picture, entry["wrong"]))}</div>'
        for entry in found.worst
    )
    sheet = "".join(picture(asdict(wrong)) for wrong in found.disagreements)
    nothing = "<p>Every image is classified as labelled.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Confusion report</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
td, th {{ padding: .15em 1em .15em 0; text-align: left; }}
.sheet {{ display: flex; flex-wrap: wrap; gap: .6em; }}
figure {{ margin: 0; width: {_THUMBNAIL}px; overflow-wrap: anywhere; font-size: 12px; }}
</style></head><body>
<h1>Confusion report: {found.samples:,} images of the {_escape(found.split)} split</h1>
<h2>Pairs of classes that are confused most</h2>
{f"<table><tr><th>label</th><th>answer</th><th>images</th><th>of the class</th></tr>{rows}</table>" if rows else nothing}
<h2>Worst classes</h2>
{worst or nothing}
<h2>Images that the network disagrees with most</h2>
<p>The answer is sure, and not the label: hard images, or labels that are wrong.</p>
<div class="sheet">{sheet or nothing}</div>
</body></html>
"""


def _escape(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())
