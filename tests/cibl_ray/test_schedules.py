"""The rate at the corners of each schedule."""

import pytest

from cibl_ray.config import CosineSchedule, StepSchedule
from cibl_ray.networks.heads.cosine import ScaleConfig, scheduled_scale
from cibl_ray.training.schedules import lr_factor


def test_steps():
    schedule = StepSchedule(kind="steps", warmup_epochs=5, milestones=(0.8, 0.9), gamma=0.1)
    at = {epoch: lr_factor(schedule, epoch, 100) for epoch in (0, 2.5, 5, 79.9, 80, 90)}
    assert list(at.values()) == pytest.approx([0.0002, 0.5, 1, 1, 0.1, 0.01])


def test_a_warm_up_by_epoch_is_that_of_the_fields_code():
    """(e+1)/W of the rate throughout epoch e."""
    schedule = StepSchedule(kind="steps", warmup_epochs=5, warmup_by="epoch")
    assert [lr_factor(schedule, epoch, 100) for epoch in (0, 0.9, 1, 3.99, 4, 4.5, 5)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.8, 1, 1, 1]
    )


def test_cosine():
    schedule = CosineSchedule(warmup_epochs=10, final=0.1)
    at = [lr_factor(schedule, epoch, 110) for epoch in (5, 10, 60, 110)]
    assert at == pytest.approx([0.5, 1, 0.55, 0.1])


def test_no_warmup_starts_at_the_full_rate():
    assert lr_factor(CosineSchedule(warmup_epochs=0), 0, 10) == 1
    assert lr_factor(CosineSchedule(warmup_epochs=10), 9.99, 10) < 1
    assert lr_factor(CosineSchedule(warmup_epochs=1e-4), 0, 10) == 1  # a warm-up shorter than a step


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [10, 10, 15, 20, 30]), ("cosine", [10, 10, 10 + 10 * (1 - 2**-0.5), 20, 30])]
)
def test_head_scale(shape, expected):
    scale = ScaleConfig(start=10, end=30, shape=shape, warmup=20)
    assert [scheduled_scale(scale, epoch, 100) for epoch in (0, 20, 40, 60, 100)] == pytest.approx(expected)


def test_a_constant_head_scale():
    assert [scheduled_scale(ScaleConfig(start=16), epoch, 10) for epoch in (0, 5, 10)] == [16, 16, 16]
