"""`python -m benchmarks.dataset_counts [--imagenet-lt FILE]`: the class counts of the long-tailed data sets, from the code.

FILE is ImageNet-LT's training list ("path label" a line), or its class counts as JSON. Prints the table of
docs/reference/data-sets.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from pipelines.common.errors import run_command
from pipelines.prepare.longtail import exp_counts
from pipelines.prepare.shots import GROUPS, shot_groups
from pipelines.prepare.sources import class_counts, read_list


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataset_counts", description=__doc__)
    parser.add_argument("--imagenet-lt", type=Path, help="its training list, or its class counts as JSON")
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    arguments = parser.parse_args()
    counts = {
        f"CIFAR-{classes}-LT, IF {imbalance}": exp_counts(classes, largest, imbalance)
        for classes, largest in ((10, 5000), (100, 500))
        for imbalance in (100, 50, 10)
    }
    if arguments.imagenet_lt is not None:
        counts["ImageNet-LT"] = imagenet_lt_counts(arguments.imagenet_lt)
    print(
        "| data set | training images | largest class | smallest class | many / medium / few classes |\n|---|---|---|---|---|"
    )
    for name, of_class in counts.items():
        groups = shot_groups(of_class)
        sizes = " / ".join(str(groups.count(group)) for group in GROUPS)
        print(f"| {name} | {of_class.sum():,} | {of_class.max():,} | {of_class.min():,} | {sizes} |")
    print(json.dumps({name: int(of_class.sum()) for name, of_class in counts.items()}))


def imagenet_lt_counts(path: Path) -> np.ndarray:
    if path.suffix == ".json":
        return np.array(json.loads(path.read_text()))
    _, labels = read_list(path)
    return class_counts(labels, int(labels.max()) + 1)


if __name__ == "__main__":
    run_command(main)
