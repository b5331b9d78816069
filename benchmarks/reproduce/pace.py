"""How long a run will take: its passes, and the seconds that a pass takes on this machine."""

from __future__ import annotations

import time

from benchmarks.train import bare_step, trainer_of
from cibl_ray.config import RunConfig
from cibl_ray.losses.cross_entropy import CrossEntropyConfig
from cibl_ray.training.passes import passes
from pipelines.common.validation import validate
from pipelines.prepare.build import ensure_prepared

_WARM, _TIMED = 1, 3  # steps of a probe


def planned(config: RunConfig) -> float:
    """The passes that a run will make, as many as are worth a pass forward and backward. Prepares its data."""
    samples = ensure_prepared(config.data, config.seed).splits["train"].samples
    return passes(config, samples // config.train.batch_size).equivalent


def seconds_a_pass(config: RunConfig) -> float:
    """Measure a few steps of a run with cross-entropy, and a fifth on top for what is not a step."""
    plain = config.with_train(cmo=None)  # which would want a second stream of images
    probe = plain.model_copy(update={"loss": CrossEntropyConfig(kind="cross_entropy")})
    config = validate(RunConfig, probe.model_dump(mode="json"), "probe")
    prepared = ensure_prepared(config.data, config.seed)
    trainer = trainer_of(config, prepared)
    bare_step(trainer, steps=_WARM)()
    timed = bare_step(trainer, steps=_TIMED)
    begun = time.perf_counter()
    images = timed()
    return 1.2 * (time.perf_counter() - begun) / (images * len(config.data.views))
