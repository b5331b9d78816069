"""How many planted wrong labels the doctor finds, and how many others it doubts.

    python -m benchmarks.doctor FOLDER [--seeds N]

FOLDER has train/CLASS/* and may have test/CLASS/*, whose labels are right or nearly. A share of all labels is changed at
random, to any other class, and the doctor judges them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.common.errors import run_command
from pipelines.config import DataConfig
from pipelines.doctor.content import find_by_content
from pipelines.doctor.examine import Examined, examine
from pipelines.doctor.features import image_features
from pipelines.prepare.splits import choose


def doubted(examined: Examined, features: np.ndarray) -> set[int]:
    """Images whose label the doctor doubts."""
    return {number for found in find_by_content(examined, features) for number in found.suspects}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = DataConfig.model_validate(
        {"source": {"kind": "folder", "path": str(arguments.folder)}, "profile": {"kind": "none"}, "on_bad_image": "skip"}
    )
    classes, splits = choose(data.source.open(), data, 0)
    examined = examine(classes, splits, data)
    began = time.perf_counter()
    features = image_features(examined, data)
    seconds = time.perf_counter() - began
    total = len(examined.label)
    result: dict[str, object] = {
        "images": total,
        "features_images_per_s": round(total / seconds, 1),
        "doubted_as_they_are": len(doubted(examined, features)),
    }
    print(f"{total:,} images; {result['doubted_as_they_are']} labels doubted as they are")
    for share in (0.01, 0.05):
        found = others = planted_in_all = 0
        for seed in range(arguments.seeds):
            random = np.random.default_rng(seed)
            planted = random.choice(total, round(share * total), replace=False)
            label = examined.label.copy()
            label[planted] = (label[planted] + random.integers(1, len(classes), len(planted))) % len(classes)
            suspects = doubted(replace(examined, label=label), features)
            found += len(suspects & {*planted.tolist()})
            others += len(suspects - {*planted.tolist()})
            planted_in_all += len(planted)
        rates = {"found": found / planted_in_all, "false": others / (arguments.seeds * total - planted_in_all)}
        result[f"planted_{share:.0%}"] = {name: round(value, 4) for name, value in rates.items()}
        print(f"{share:.0%} of the labels changed: {rates['found']:.1%} found, {rates['false']:.2%} of the others doubted")
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
