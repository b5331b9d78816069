"""What a run says to the one who waits for it: how long it will take, what slows it down, and what to try at its end."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cibl_ray.config import RunConfig
from cibl_ray.evaluation.metrics import Scores
from cibl_ray.run.folder import CONFIG, resume_command
from pipelines.common.cores import usable_cores
from pipelines.common.progress import duration
from pipelines.common.words import plural

_LONG = 4 * 3600  # seconds of a run, from which on cheaper ways are named
_STEPS, _SECONDS = 10, 10.0  # the least that is measured
_OTHERS = 0.25  # of the cores, which other programs may use before it is said
_NAMED = 5  # classes in a line
_ENOUGH = 5  # images of a class, from which on an accuracy of 0 says something
_PHOTOGRAPHS = 64  # pixels of a side, from which on a network pretrained on photographs is of use
_WHICH_IMAGES = ("profile", "split_by", "exclude", "subset_seed", "on_bad_image", "max_pixels", "window")  # of `data`


class FirstSteps:
    """Measures a run's first steps, and says once what follows from them.

    Args:
        config: The run's configuration.
        run: The run folder.
        left: Steps until the run's end.
        alone: Whether the run has one worker. The others' work is not that of strangers.
        resumed: Whether some of the run is done.
    """

    def __init__(self, config: RunConfig, run: Path, left: int, alone: bool = True, resumed: bool = False) -> None:
        self._config, self._run, self._left, self._alone, self._resumed = config, run, left, alone, resumed
        self._steps = 0
        self._since, self._busy = 0.0, _Cores()
        self.done = False

    def step(self) -> list[str]:
        """Count a step. Returns the advice, once it is due, and otherwise nothing."""
        self._steps += 1
        if self._steps == 1:  # the first one compiles, allocates and fills queues
            self._since, self._busy = time.monotonic(), _Cores()
            return []
        steps, seconds = self._steps - 1, time.monotonic() - self._since
        if steps < _STEPS or seconds < _SECONDS:
            return []
        self.done = True
        found = [long_run(self._config, steps / seconds, self._left - self._steps, self._resumed)]
        if self._config.train.device == "cpu" and self._alone:
            found.append(busy_cores(torch.get_num_threads(), usable_cores(), self._busy.others(), self._run))
        return [text for text in found if text]


def long_run(config: RunConfig, steps_per_s: float, left: int, resumed: bool = False) -> str:
    """Say how long a run will take and what is cheaper, where that is hours.

    Args:
        config: The run's configuration.
        steps_per_s: Steps a second, as measured.
        left: Steps until the run's end.
        resumed: Whether some of the run is done: it cannot be made shorter than that.
    """
    seconds = left / steps_per_s
    if seconds < _LONG:
        return ""
    train, ways = config.train, []
    pretrained = config.network.backbone.pretrained
    if train.tune != "head" and pretrained:
        ways.append("--train.tune head (features once, then minutes)")
    elif train.tune != "head" and config.data.size >= _PHOTOGRAPHS:
        ways.append(f"{_photos(config)} (a pretrained network: minutes)")
    if not resumed and (epochs := int(train.epochs * 3600 / seconds)) >= 1:
        ways.append(f"--train.epochs {epochs} (an hour)")
    if config.data.size > _PHOTOGRAPHS and not pretrained:
        ways.append(f"--data.size {_PHOTOGRAPHS} with --network.backbone resnet32")
    rate = steps_per_s * train.batch_size
    text = f"at {rate:,.0f} img/s {'the rest of ' if resumed else ''}this run takes about {duration(seconds)} on this machine"
    return text + (f"; cheaper: {'; '.join(ways)}" if ways else "")


def busy_cores(threads: int, cores: int, others: float, run: Path) -> str:
    """Say that several threads are slower than one where other programs compute, too.

    Args:
        threads: Threads of torch.
        cores: Cores that this process may use.
        others: How many of them other programs keep busy.
        run: The run folder.
    """
    if threads < 2 or 2 * threads < cores or others < _OTHERS * cores:
        return ""
    return (
        f"other programs keep {others:.1f} of this machine's {cores} cores busy; {threads} threads, which wait for each other "
        "at every operation, can then be several times slower than one: stop this run (Ctrl-C saves it), and "
        f"OMP_NUM_THREADS=1 {resume_command(run)}"
    )


def classes_at_zero(
    config: RunConfig, classes: list[str], counts: np.ndarray, scored: Sequence[int], scores: Scores, shifted: bool, run: Path
) -> str:
    """Say what to try where a network never answers some classes rightly. Of a few images that is chance, and nothing is said.

    Args:
        config: The run's configuration.
        classes: Class names.
        counts: Training images of each class.
        scored: Images of each class that the scores are of.
        scores: The run's scores on held-out images.
        shifted: Whether validation images chose a tail shift.
        run: The run folder.
    """
    zero = [label for label, accuracy in enumerate(scores.per_class) if accuracy == 0 and scored[label] >= _ENOUGH]
    if not zero:
        return ""
    zero.sort(key=lambda label: -counts[label])
    names = ", ".join(f"{classes[label]} ({plural(int(counts[label]), 'image')})" for label in zero[:_NAMED])
    more = f" and {len(zero) - _NAMED} more" if len(zero) > _NAMED else ""
    ways = []
    if shifted:
        ways.append(f"python -m cibl_ray.evaluate {shlex.quote(str(run))} --tail-shift auto")
    if not config.network.backbone.pretrained and config.data.size >= _PHOTOGRAPHS:
        ways.append(_photos(config))
    if way := config.loss.advice_for_rare_classes:
        ways.append(way)
    if config.train.epochs:
        ways.append(f"more epochs: {resume_command(run)} --train.epochs {2 * config.train.epochs}")
    return f"{len(zero)} of {len(classes)} classes are at 0 %: {names}{more}. To try: {'; '.join(ways)}"


def uses(run: Path) -> str:
    """Say what a finished run is for: answers for new images, and a service.

    Args:
        run: The run's folder.
    """
    folder, bundle = shlex.quote(str(run)), shlex.quote(str(run / "bundle"))
    return (
        f"Use it:     python -m cibl_ray.predict {folder} IMAGES\n"
        f"Serve it:   python -m cibl_ray.export {folder}; python -m serve --simple {bundle}"
    )


def next_steps(config: RunConfig, run: Path) -> str:
    """Say what may do better than a head on the features of a pretrained network; nothing after another run.

    The commands start from the run's own file: its data, its backbone and what else was set stay.

    Args:
        config: The run's configuration.
        run: The run folder.
    """
    if config.train.tune != "head" or not config.network.backbone.pretrained:
        return ""
    own = shlex.quote(str(run / CONFIG))
    # The file has this run's device and precision.
    gpu = "overnight; on a GPU: --device auto --precision auto" if config.train.device == "cpu" else "much longer"
    return (
        f"To try next: python -m cibl_ray.tune sweeps/photos --base {own}  (a hundred heads on these features, some minutes)\n"
        f"             python -m cibl_ray.train {own} --tune partial  "
        "(the last blocks, too: ten times as long as the features took)\n"
        f"             python -m cibl_ray.train {own} --tune full  (everything: {gpu})"
    )


def _photos(config: RunConfig) -> str:
    """The command that trains `photos` on the images of a run."""
    data = config.data.model_dump(mode="json", exclude_defaults=True)
    source = data["source"]
    if source.keys() == {"kind", "path"} and source["kind"] == "folder":  # the kind of `photos`
        flags = ["--data.source.path", source["path"]]
    else:
        flags = ["--data.source", _flag(source)]
    for name in _WHICH_IMAGES:
        if name in data:
            flags += [f"--data.{name}", _flag(data[name])]
    return shlex.join(["python", "-m", "cibl_ray.train", "photos", *flags])


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Cores:
    """How busy this process's cores are, from now on."""

    def __init__(self) -> None:
        self._since, self._all, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def others(self) -> float:
        """How many cores other programs have used, on average; 0 where the system does not tell."""
        seconds = time.monotonic() - self._since
        return max(0.0, (_busy_seconds() - self._all) - (_own_seconds() - self._own)) / seconds if seconds else 0.0


def _busy_seconds() -> float:
    """Seconds in which the cores that this process may use were busy, since the machine started."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return 0.0
    # user, nice, system, idle, iowait, irq, softirq
    ticks = sum(int(value) for line in lines if line and line[0] in allowed for value in (*line[1:4], *line[6:8]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and of its children, such as a loader's workers."""
    own = str(os.getpid())
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if stat.parent.name == own or fields[1] == own:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
