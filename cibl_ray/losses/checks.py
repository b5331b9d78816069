"""What the loss modules check of their inputs, before a kernel fails on them or a NaN spreads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from cibl_ray.losses.base import LossSettings
from cibl_ray.networks.precision import at_least_float32
from pipelines.common.errors import shown
from pipelines.common.validation import validate

Config = TypeVar("Config", bound=LossSettings)

# Unit norm as bf16 keeps it: its numbers have 8 bits.
NORM_TOLERANCE = 0.02


def checked_settings(config: type[Config], **settings: Any) -> Config:
    """A method's configuration, from what its module was given.

    Args:
        config: The configuration's class, `XConfig` of the module `XLoss`.
        **settings: Its fields.

    Raises:
        ValueError: One line names the field that has a value that it cannot have.
    """
    return validate(config, settings, f"{config.__name__.removesuffix('Config')}Loss")


def check_whole(name: str, value: int, least: int) -> None:
    """Check a whole number.

    Args:
        name: What the caller calls it, for the message.
        value: The number.
        least: The smallest that it may be.

    Raises:
        ValueError: It is smaller, or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {shown(value)}; give a whole number of {least} or more")


def check_positive(name: str, value: float) -> None:
    """Check a number.

    Args:
        name: What the caller calls it, for the message.
        value: The number.

    Raises:
        ValueError: It is not a finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {shown(value)}; give a finite number above 0")


def check_progress(progress: float) -> None:
    """Check the share of the run that is done.

    Raises:
        ValueError: It is not a number from 0 to 1.
    """
    number = progress.numel() == 1 if isinstance(progress, torch.Tensor) else isinstance(progress, int | float | np.number)
    if not number or not 0 <= progress <= 1:
        raise ValueError(f"progress is {shown(progress)}; give the share of the run that is done, 0 to 1")


def check_queue(queue: Any) -> None:
    """Check that a queue is a pair; its parts are checked as embeddings and labels.

    Raises:
        ValueError: It is not a pair.
    """
    if not isinstance(queue, tuple | list) or len(queue) != 2:
        raise ValueError(f"queue is {_kind(queue)}; give a pair, (embeddings, labels)")


def check_tensor(name: str, x: Any) -> None:
    """Check that an input is a tensor.

    Args:
        name: What the caller calls it, for the message.
        x: The input.

    Raises:
        ValueError: It is not a tensor.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {_kind(x)}; give a torch.Tensor, as by torch.as_tensor")


def _kind(x: Any) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"


def checked_counts(class_counts: Sequence[float] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """The class counts as a tensor, (C,), on the CPU.

    Raises:
        ValueError: They are not C finite numbers of 0 or more.
    """
    try:
        counts = torch.as_tensor(class_counts).detach().cpu()
    except (TypeError, ValueError, RuntimeError):  # torch's choice of error differs from input to input
        raise ValueError(f"class_counts is {shown(class_counts)}; give one number for each class, (C,)") from None
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"class_counts has shape {tuple(counts.shape)}; give one number for each class, (C,)")
    if counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"class_counts is of type {counts.dtype}; give how many training images each class has")
    wrong = torch.nonzero(~(torch.isfinite(counts) & (counts >= 0))).flatten()
    if len(wrong):
        raise ValueError(f"class_counts[{wrong[0]}] = {counts[wrong[0]].item()}; counts are finite and 0 or more")
    # As whole numbers they keep their values where a module is cast to float16.
    return counts.long() if counts.is_floating_point() and bool((counts == counts.round()).all()) else counts


def check_labels(name: str, labels: torch.Tensor, rows: int) -> torch.Tensor:
    """Labels as int64, (M,).

    Args:
        name: What the caller calls them, for the message.
        labels: Of any integer type, (M,).
        rows: M.

    Raises:
        ValueError: They are not a tensor, have another shape, or are not integers.
    """
    check_tensor(name, labels)
    if labels.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; expected one label for each row, ({rows},)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} is of type {labels.dtype}; give the classes' numbers, as torch.int64")
    return labels.long()


def check_matrix(name: str, x: torch.Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Check the shape and the type of floats.

    Args:
        name: What the caller calls them, for the message.
        x: Floats, (rows, columns).
        rows: How many rows it must have; None: any number.
        columns: How many columns it must have; None: any number.

    Raises:
        ValueError: It is not a tensor, has another shape, or does not hold real floats.
    """
    check_tensor(name, x)
    fits = x.ndim == 2 and rows in (None, x.shape[0]) and columns in (None, x.shape[1])
    if not fits:
        expected = f"({'M' if rows is None else rows}, {'d' if columns is None else columns})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
    if not x.is_floating_point():
        raise ValueError(f"{name} is of type {x.dtype}; expected floats")


@torch.compiler.disable
@torch.no_grad()
def check_values(
    labels: dict[str, torch.Tensor], floats: dict[str, torch.Tensor], units: dict[str, torch.Tensor], classes: int
) -> None:
    """Check the values of all inputs. Waits for the device, once.

    Args:
        labels: Of int64, each (M,), by name.
        floats: What must be finite, by name.
        units: What must have rows of unit norm, (M, d), by name.
        classes: C.

    Raises:
        ValueError: A label is not in 0, ..., C-1, a number is not finite, or a norm is not 1.
    """
    faults = [((each < 0) | (each >= classes)).any() for each in labels.values()]
    faults += [~torch.isfinite(each).all() for each in floats.values()]
    faults += [((norms(each) - 1).abs() > NORM_TOLERANCE).any() for each in units.values()]
    if not faults or not any(found := torch.stack(faults).tolist()):
        return
    names = [*labels, *floats, *units]
    number = found.index(True)
    name = names[number]
    if number < len(labels):
        wrong = next(each for each in labels[name].tolist() if not 0 <= each < classes)
        raise ValueError(f"{name} holds {wrong}; with {classes} classes labels are 0 to {classes - 1}")
    if number < len(labels) + len(floats):
        count = int((~torch.isfinite(floats[name])).sum())
        raise ValueError(f"{name} holds {count} values that are not finite (NaN or infinite); lower the learning rate, or clip")
    wrong = next(each for each in norms(units[name]).tolist() if abs(each - 1) > NORM_TOLERANCE)
    raise ValueError(f"{name} has a row of norm {wrong:.4g}, though normalized=True promises 1; leave normalized out")


def norms(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norms of the rows of x (M, d), (M,), in at least float32."""
    return torch.linalg.vector_norm(at_least_float32(x), dim=1)


def to_unit_norm(x: torch.Tensor) -> torch.Tensor:
    """The rows of x (M, d) at unit norm, in at least float32. A row of zeros stays one, with a finite gradient."""
    x = at_least_float32(x)
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(lengths > 0, lengths, 1.0)
