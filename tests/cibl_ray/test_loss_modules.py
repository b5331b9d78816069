"""The losses as torch modules: the formulas' values, what they refuse, mixed precision, compilation, several processes."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cibl_ray import losses
from cibl_ray.losses.config import AnyLoss
from tests.cibl_ray import plain_losses as plain
from tests.cibl_ray.plain_losses import (
    CLASSES,
    COUNTS,
    LABELS,
    LOG_PRIOR,
    WIDTH,
    Example,
    assert_same_gradients,
)
from tests.conftest import REPOSITORY

# Each module, and its loss of logits f, embeddings z, labels y, prototypes p, a queue q and the plain values of the same.
CASES = {
    "CrossEntropyLoss": (
        losses.CrossEntropyLoss,
        lambda loss, e, q: loss(e.logits, e.labels),
        lambda e, z, all_z, all_y: plain.cross_entropy(e.logits, e.labels).mean(),
    ),
    "BalancedSoftmaxLoss": (
        lambda counts, **more: losses.BalancedSoftmaxLoss(counts, 0.7, **more),
        lambda loss, e, q: loss(e.logits, e.labels),
        lambda e, z, all_z, all_y: plain.cross_entropy(e.logits + 0.7 * LOG_PRIOR, e.labels).mean(),
    ),
    "LDAMLoss": (
        lambda counts, **more: losses.LDAMLoss(counts, max_margin=0.4, scale=3.0, **more),
        lambda loss, e, q: loss(e.logits, e.labels),
        lambda e, z, all_z, all_y: plain.cross_entropy(
            e.logits - 3 * 0.4 * (COUNTS.double() / 5) ** -0.25 * F.one_hot(e.labels, CLASSES), e.labels
        ).mean(),
    ),
    "VSLoss": (
        losses.VSLoss,
        lambda loss, e, q: loss(e.logits, e.labels),
        lambda e, z, all_z, all_y: plain.vs(e.logits, e.labels, 0.15, 1.0).mean(),
    ),
    "LabelSmoothingLoss": (
        lambda counts, **more: losses.LabelSmoothingLoss(counts, 0.3, 0.05, "linear", **more),
        lambda loss, e, q: loss(e.logits, e.labels),
        lambda e, z, all_z, all_y: plain.label_smoothing(e.logits, e.labels, 0.3, 0.05, "linear").mean(),
    ),
    "SupConLoss": (
        lambda counts, **more: losses.SupConLoss(counts, 0.2, **more),
        lambda loss, e, q: loss(e.z, e.labels, queue=q),
        lambda e, z, all_z, all_y: plain.supcon(z, e.labels, all_z, all_y, 0.2).mean(),
    ),
    "BCLLoss": (
        losses.BCLLoss,
        lambda loss, e, q: loss(e.logits, e.z, e.labels, e.prototypes, queue=q),
        lambda e, z, all_z, all_y: (
            0.6 * plain.balanced(z, e.labels, all_z, all_y, F.normalize(e.prototypes, dim=1), 0.1).mean()
            + 2 * plain.cross_entropy(e.logits + LOG_PRIOR, e.labels).mean()
        ),
    ),
    "PaCoLoss": (
        losses.PaCoLoss,
        lambda loss, e, q: loss(e.logits, e.z, e.labels, queue=q),
        lambda e, z, all_z, all_y: plain.paco(e.logits + LOG_PRIOR, z, e.labels, all_z, all_y, 0.07, 0.05, 1.0).mean(),
    ),
    "HybridSCLoss": (
        losses.HybridSCLoss,
        lambda loss, e, q: loss(e.logits, e.z, e.labels, progress=0.5),
        lambda e, z, all_z, all_y: (
            0.75 * plain.supcon(z, e.labels, z, e.labels, 0.1).mean() + 0.25 * plain.cross_entropy(e.logits, e.labels).mean()
        ),
    ),
    "CIBLLoss": (
        lambda counts, **more: losses.CIBLLoss(counts, 0.3, kappa=0.5, **more),
        lambda loss, e, q: loss(e.logits, e.z, e.labels, queue=q),
        lambda e, z, all_z, all_y: plain.cibl(e.logits + 0.5 * LOG_PRIOR, z, e.labels, all_z, all_y, 0.3, 0.1, 1),
    ),
    "CIBLLoss of first views": (
        lambda counts, **more: losses.CIBLLoss(counts, 0.3, normalize="batch", views=2, **more),
        lambda loss, e, q: loss(e.logits, e.z, e.labels, queue=q),
        lambda e, z, all_z, all_y: plain.cibl(e.logits, z, e.labels, all_z, all_y, 0.3, 0.1, 2, "batch"),
    ),
    "CIBLLoss with expected numbers": (
        lambda counts, **more: losses.CIBLLoss(counts, 0.3, logit_gamma=0.2, count="expected", **more),
        lambda loss, e, q: loss(e.logits, e.z, e.labels, queue=q),
        lambda e, z, all_z, all_y: plain.cibl(
            plain.scaled(e.logits, 0.2), z, e.labels, all_z, all_y, 0.3, 0.1, 1, expected=True
        ),
    ),
}  # fmt: skip
CONTRASTIVE = [name for name in CASES if name.startswith(("SupCon", "BCL", "PaCo", "Hybrid", "CIBL"))]


def example(name="mixed", queued=False, dtype=torch.float64):
    """Embeddings and prototypes that are not of unit norm."""
    e = Example(name, dtype, queued)
    with torch.no_grad():
        e.z *= torch.linspace(0.1, 40, len(e.z), dtype=dtype)[:, None]
        e.prototypes *= 3
    return e


def queue_of(e):
    return (e.queue * 5, e.queue_labels) if len(e.queue) else None


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", CASES)
def test_a_module_has_the_formulas_value_and_gradient(name, labels, queued):
    make, call, formula = CASES[name]
    e = example(labels, queued)
    z = F.normalize(e.z, dim=1)
    reference = formula(e, z, torch.cat((z, e.queue)), torch.cat((e.labels, e.queue_labels)))
    if name == "HybridSCLoss" and queued:
        pytest.skip("takes no queue")
    value = call(make(COUNTS), e, queue_of(e))
    assert value.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(value, reference, e.leaves, rtol=1e-5, atol=1e-9, share=1e-7)


@pytest.mark.parametrize("make", [losses.PSCLoss, losses.HybridPSCLoss])
def test_learned_prototypes_are_parameters(make):
    e, loss = example(), make(COUNTS, WIDTH).double()
    assert [name for name, _ in loss.named_parameters()] == ["prototypes"]
    contrastive = plain.psc(F.normalize(e.z, dim=1), e.labels, F.normalize(loss.prototypes, dim=1), 0.1, False).mean()
    if make is losses.PSCLoss:
        value, reference = loss(e.z, e.labels), contrastive
    else:
        classified = plain.cross_entropy(e.logits[:4], e.labels[:4]).mean()
        value = loss(e.logits[:4], e.z, e.labels, classifier_labels=e.labels[:4], progress=0.8)
        reference = 0.36 * contrastive + 0.64 * classified
    assert value.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(value, reference, [e.z, loss.prototypes], rtol=1e-6, atol=1e-9)


def test_proco_estimates_its_classes_from_the_steps_that_it_sees():
    random = torch.Generator().manual_seed(0)
    loss = losses.ProCoLoss(COUNTS, 32, kappa=0.5, contrastive_weight=0.7)
    labels, own = torch.arange(10) % CLASSES, torch.tensor([3, 0, 1, 2])
    for _ in range(2):
        raw = torch.randn(10, 32, generator=random).requires_grad_()
        logits = torch.randn(4, CLASSES, generator=random).requires_grad_()
        before, value = loss.class_means.means.clone(), loss(logits, raw, labels, own, progress=0.25)
    means, z = loss.class_means.means, F.normalize(raw, dim=1)
    assert torch.allclose(means[:10], (before[:10] + z) / 2, atol=1e-6)  # the second image of each
    reference = 0.7 * plain.proco(z.double(), labels, means.double(), 0.1, 0.5).mean()
    reference = reference + plain.cross_entropy((logits + 0.5 * LOG_PRIOR).double(), own).mean()
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    assert_same_gradients(value, reference, [raw, logits], rtol=1e-3, atol=1e-6)
    again = losses.ProCoLoss(COUNTS, 32)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.class_means.means, means)
    with pytest.raises(ValueError, match="size is 8; ProCo's distributions are computed for embeddings of 16 dimensions"):
        losses.ProCoLoss(COUNTS, 8)


@pytest.mark.parametrize("method", get_args(AnyLoss))
def test_a_module_has_the_defaults_of_its_configuration(method):
    """Every method has a module, and what both can set has the same default."""
    parameters = inspect.signature(getattr(losses, method.__name__.removesuffix("Config") + "Loss")).parameters
    fields = method.model_fields.keys() & parameters.keys()
    assert {name: parameters[name].default for name in fields} == {name: method.model_fields[name].default for name in fields}
    assert {"class_counts", "validate"} <= parameters.keys()


def test_the_names_of_all_modules_are_listed():
    assert {method.__name__.removesuffix("Config") + "Loss" for method in get_args(AnyLoss)} == set(losses.__all__)
    assert set(losses.__all__) <= set(dir(losses))
    with pytest.raises(AttributeError, match="has no attribute 'FocalLoss'"):
        _ = losses.FocalLoss


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    e, loss = example(), losses.CIBLLoss(COUNTS)
    assert torch.equal(loss(e.logits, e.z, e.labels.to(dtype)), loss(e.logits, e.z, e.labels))


def test_unit_norm_is_checked_where_it_is_promised():
    e = Example("mixed", torch.float32, queued=False)
    promised = losses.CIBLLoss(COUNTS, normalized=True)
    assert promised(e.logits, e.z, e.labels).item() == pytest.approx(
        losses.CIBLLoss(COUNTS)(e.logits, e.z, e.labels).item(), rel=1e-6
    )
    assert promised(e.logits, e.z.bfloat16(), e.labels).isfinite()
    with pytest.raises(ValueError, match=r"embeddings has a row of norm 2, though normalized=True promises 1"):
        promised(e.logits, 2 * e.z, e.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, z, y: (f, z, y + 11), r"labels holds 12; with 12 classes labels are 0 to 11"),
        (lambda f, z, y: (f, z, y - 1), r"labels holds -1; with 12 classes labels are 0 to 11"),
        (lambda f, z, y: (f, z, y.float()), r"labels is of type torch.float32; give the classes' numbers"),
        (lambda f, z, y: (f, z, y == 0), r"labels is of type torch.bool"),
        (lambda f, z, y: (f, z, y[:9]), r"labels has shape \(9,\); expected one label for each row, \(10,\)"),
        (lambda f, z, y: (f, z, F.one_hot(y, 12)), r"labels has shape \(10, 12\)"),
        (lambda f, z, y: (f[:, :5], z, y), r"logits has shape \(10, 5\); expected \(10, 12\)"),
        (lambda f, z, y: (f[0], z, y), r"logits has shape \(12,\)"),
        (lambda f, z, y: (f, z[:9], y), r"embeddings has shape \(9, 7\); expected \(10, d\)"),
        (lambda f, z, y: (f, z[None], y), r"embeddings has shape \(1, 10, 7\)"),
        (lambda f, z, y: (f.long(), z, y), r"logits is of type torch.int64; expected floats"),
        (lambda f, z, y: (f * torch.nan, z, y), r"logits holds 120 values that are not finite"),
        (lambda f, z, y: (f, z / 0, y), r"embeddings holds 70 values that are not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    e = Example("mixed", torch.float32, queued=False)
    logits, z, labels = change(e.logits.detach(), e.z.detach(), e.labels)
    with pytest.raises(ValueError, match=message):
        losses.CIBLLoss(COUNTS)(logits, z, labels)


@pytest.mark.parametrize("name", losses.__all__)
def test_what_is_no_tensor_is_refused_in_one_line_that_names_it(name):
    make = getattr(losses, name)
    wide = ({"size": 16} if "size" in inspect.signature(make).parameters else {}) | {"validate": False}
    loss = make([5, 1, 2], **wide)
    inputs = {"logits": torch.randn(4, 3), "embeddings": torch.randn(4, 16), "labels": torch.tensor([0, 1, 2, 0])}
    inputs |= {"prototypes": torch.randn(3, 16), "queue": (torch.randn(2, 16), torch.tensor([0, 1])), "progress": 0.5}
    inputs["classifier_labels"] = inputs["labels"].clone()
    taken = {each: inputs[each] for each in inspect.signature(loss.forward).parameters}
    assert loss(**taken).isfinite()
    for argument, value in taken.items():
        wrong = ["text", [1, 2, 3]]
        if isinstance(value, torch.Tensor):
            wrong += [value.tolist(), value.numpy(), 1] + ([] if argument == "classifier_labels" else [None])
        elif argument == "queue":
            wrong += [value[:1], value[0], tuple(each.numpy() for each in value)]
        else:
            wrong += [None, 1.5, float("nan"), torch.tensor([0.1, 0.2])]
        for each in wrong:
            with pytest.raises(ValueError, match=argument if argument != "classifier_labels" else "labels") as refused:
                loss(**taken | {argument: each})
            assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("make", [losses.PSCLoss, losses.HybridPSCLoss, losses.ProCoLoss])
def test_a_size_that_does_not_fit_is_refused(make):
    inputs = {"logits": torch.randn(4, 3), "embeddings": torch.randn(4, 16), "labels": torch.tensor([0, 1, 2, 0])}
    loss = make([5, 1, 2], 32)
    with pytest.raises(ValueError, match=r"embeddings has shape \(4, 16\), and size is 32; give size=16"):
        loss(**{each: inputs[each] for each in inspect.signature(loss.forward).parameters if each in inputs})
    for size in (0, -1, 2.5, "16", True, None):
        with pytest.raises(ValueError, match=f"size is {size!r}; give a whole number of 1 or more"):
            make([5, 1, 2], size)


def test_logits_that_are_of_other_images_need_labels_of_their_own():
    e = Example("mixed", torch.float32, queued=False)
    with pytest.raises(ValueError, match=r"^logits has shape \(9, 12\); expected \(10, 12\)"):
        losses.HybridSCLoss(COUNTS)(e.logits[:9], e.z, e.labels)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_queue_that_does_not_fit_is_refused(name):
    make, call, _ = CASES[name]
    e = example()
    if name == "HybridSCLoss":
        pytest.skip("takes no queue")
    with pytest.raises(ValueError, match=r"queue\[0\] has shape \(3, 5\); expected \(M, 7\)"):
        call(make(COUNTS), e, (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"queue\[1\] holds 12"):
        call(make(COUNTS), e, (torch.randn(3, 7), torch.full((3,), 12)))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, -1], r"class_counts\[1\] = -1; counts are finite and 0 or more"),
        ([3.0, float("nan")], r"class_counts\[1\] = nan"),
        ([], r"class_counts has shape \(0,\)"),
        ([[3, 1]], r"class_counts has shape \(1, 2\)"),
        ("many", "class_counts is 'many'; give one number for each class"),
        (None, "class_counts is None"),
        ({0: 3}, "class_counts is {0: 3}"),
        ([3, "1"], r"class_counts is \[3, '1'\]"),
    ],
)
def test_counts_that_are_none_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        losses.CIBLLoss(counts)


@pytest.mark.parametrize("name", losses.__all__)
def test_settings_out_of_range_are_refused_in_one_line(name):
    make = getattr(losses, name)
    of_tensors = {"class_counts", "size", "normalized", "gather", "validate"}
    wide = {"size": 16} if "size" in inspect.signature(make).parameters else {}
    for setting in inspect.signature(make).parameters.keys() - of_tensors:
        for value in (-1, float("nan"), "text", None):
            if (setting, value) == ("positive_in_denominator", "text"):
                continue
            with pytest.raises(ValueError, match=rf"^({name}: )?{setting} (=|is) ") as refused:
                make(COUNTS, **wide, **{setting: value})
            assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("views", [0, -2, 1.5, True])
def test_views_are_one_or_more(views):
    with pytest.raises(ValueError, match=f"views is {views}; give a whole number of 1 or more"):
        losses.CIBLLoss(COUNTS, views=views)


@pytest.mark.parametrize("name", CASES)
def test_a_class_count_of_0_counts_as_1(name):
    make, call, _ = CASES[name]
    e, counts = example(), COUNTS.clone()
    counts[3], counts[-1] = 0, 0
    assert call(make(counts), e, None) == call(make(counts.clamp(min=1)), e, None)
    assert call(make(np.zeros(CLASSES)), e, None).isfinite()


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_has_the_loss_0(name):
    make, call, _ = CASES[name]
    e = example()
    e.logits, e.z, e.labels = e.logits[:0], e.z[:0], e.labels[:0]
    value = call(make(COUNTS), e, None)
    assert value.item() == 0
    value.backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in e.leaves)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_an_embedding_of_zeros_has_a_finite_gradient(name):
    make, call, _ = CASES[name]
    e = example(dtype=torch.float32)
    with torch.no_grad():
        e.z[2] = 0
    value = call(make(COUNTS), e, None)
    value.backward()
    assert value.isfinite()
    assert e.z.grad.isfinite().all()
    assert e.z.grad.norm() < 1e3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_under_autocast_the_loss_is_that_of_float32(name, precision):
    make, call, _ = CASES[name]
    e = example(dtype=torch.float32)
    half = Example("mixed", torch.float32, queued=False)
    half.leaves = [leaf.detach().to(precision).requires_grad_() for leaf in e.leaves]
    half.logits, half.z, half.prototypes = half.leaves
    with torch.autocast("cpu", precision):
        value = call(make(COUNTS), half, None)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(call(make(COUNTS), e, None).item(), rel=2e-2)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in half.leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile asks tensors that are no leaves
@pytest.mark.parametrize("rows", [10, 1100])
@pytest.mark.parametrize("name", ["CIBLLoss", "BCLLoss"])
def test_compiled_modules_compute_the_same(name, rows):
    """All pairs at once, and in tiles. aot_eager traces the forward and the backward pass, and needs no compiler of C++."""
    make, call, _ = CASES[name]
    random = torch.Generator().manual_seed(0)
    e = example(dtype=torch.float32)
    e.labels = torch.randint(CLASSES, (rows,), generator=random)
    e.leaves = [
        torch.randn(count, size, generator=random) for count, size in ((rows, CLASSES), (rows, WIDTH), (CLASSES, WIDTH))
    ]
    e.logits, e.z, e.prototypes = (leaf.requires_grad_() for leaf in e.leaves)
    loss = make(COUNTS, validate=False)
    values = [call(each, e, None) for each in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    assert_same_gradients(*values, e.leaves, rtol=1e-4, atol=1e-7)
    checked = torch.compile(make(COUNTS), backend="aot_eager")
    assert call(checked, e, None).item() == pytest.approx(values[0].item(), rel=1e-5)
    e.labels = e.labels + CLASSES
    with pytest.raises(ValueError, match="labels holds"):
        call(checked, e, None)


class Model(nn.Module):
    """Features (M, 6) to the loss: a network that DistributedDataParallel wraps."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.classifier, self.projection = nn.Linear(6, CLASSES).double(), nn.Linear(6, WIDTH).double()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, WIDTH, generator=random, dtype=torch.float64))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64)

    def forward(self, x):
        return self.classifier(x), self.projection(x), self.prototypes


def gradients_of(name, model, rows, gather):
    """The gradients of a model, by parameter, for some rows of ten images."""
    make, call, _ = CASES[name]
    e = Example("mixed", torch.float64, queued=False)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model.zero_grad()
    e.logits, e.z, e.prototypes = model(x[rows])
    e.labels = e.labels[rows]
    value = call(make(COUNTS, gather=gather), e, None)
    # In every process each parameter takes part, which DistributedDataParallel asks for.
    (value + 0 * sum(parameter.sum() for parameter in model.parameters())).backward()
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env=base,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", ["even", "uneven", "one empty"])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_two_processes_have_the_gradients_of_one(name, split, two_processes):
    """DistributedDataParallel's average is the gradient of the mean over all rows."""
    alone = gradients_of(name, Model(), slice(0, 10), gather=False)
    for process in two_processes:
        for parameter, gradient in process[name, split].items():
            assert torch.allclose(gradient, alone[parameter], rtol=1e-9, atol=1e-12), parameter


def test_a_process_that_refuses_its_input_stops_all(two_processes):
    assert two_processes[0]["refused"] == ["rank 1 refused its input of this step; its own error says why"] * 2
    value, kind = two_processes[1]["refused"]
    assert value.startswith("labels holds 12;")
    assert kind.startswith("labels is of type list;")


def test_proco_knows_the_same_classes_where_a_process_has_no_rows(two_processes):
    first, second = (process["class means"] for process in two_processes)
    assert first.any()
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", [losses.VSLoss, losses.LabelSmoothingLoss, losses.LDAMLoss])
def test_counts_keep_their_values_in_half_precision(make):
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    counts = torch.tensor([100_000.0, 500.0, 3.0])
    assert torch.allclose(make(counts).half()(logits, labels), make(counts)(logits, labels), rtol=1e-3)


SPLITS = {"even": 4, "uneven": 6, "one empty": 10}  # rows of the first process; views of 2 stay together


def _work(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {}
    for name in CONTRASTIVE:
        for split, first in SPLITS.items():
            rows = slice(0, first) if rank == 0 else slice(first, 10)
            result[name, split] = gradients_of(name, DistributedDataParallel(Model()), rows, gather=True)
    proco, mine = losses.ProCoLoss(COUNTS, 16, gather=True), 5 * (1 - rank)
    random = torch.Generator().manual_seed(0)
    proco(torch.randn(mine, CLASSES), torch.randn(mine, 16, generator=random), torch.arange(mine) % CLASSES)
    result["class means"] = proco.class_means.means
    labels = torch.full((3,), 12 * rank)
    result["refused"] = []
    for each in (labels, labels.tolist() if rank else labels):
        try:
            losses.CIBLLoss(COUNTS, gather=True)(torch.randn(3, CLASSES), torch.randn(3, WIDTH), each)
        except ValueError as error:
            result["refused"].append(str(error))
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def code_blocks(path):
    """The Python blocks of a Markdown file, in order."""
    return re.findall(r"^```python\n(.*?)^```", (REPOSITORY / path).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("path", "timm"),
    [("README.md", False), ("docs/how-to/loss-in-your-loop.md", False), ("docs/how-to/loss-in-your-loop.md", True)],
)
def test_the_loops_of_the_documentation_run(path, timm):
    blocks = [block for block in code_blocks(path) if "CIBLLoss(" in block and "lightning" not in block]
    (code,) = [block for block in blocks if ("import timm" in block) == timm]
    names = {}
    exec(compile(code, path, "exec"), names)
    assert names["loss"].isfinite()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in names["projection"].parameters())


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed (extra: dev)")
def test_the_lightning_example_of_the_documentation_runs(tmp_path):
    (code,) = [block for block in code_blocks("docs/how-to/loss-in-your-loop.md") if "import lightning" in block]
    code += "\nassert trainer.callback_metrics['loss'].isfinite() and trainer.global_step == 12\n"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_package_of_losses_loads_no_torch():
    code = "import sys, cibl_ray.losses.config; print('torch' in sys.modules, cibl_ray.losses.CIBLLoss.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "False CIBLLoss\n", done.stderr


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
