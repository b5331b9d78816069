"""Every loss against a plain float64 loop written from its formula, value and gradient; and the limits of CIBL."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.losses import pairs, peak_bytes
from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.bcl import balanced_contrastive
from cibl_ray.losses.cibl import cibl, term_weights
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.hybrid import contrastive_share
from cibl_ray.losses.inputs import ClassPrior, ContrastSet
from cibl_ray.losses.label_smoothing import class_smoothing, smoothed_cross_entropy
from cibl_ray.losses.ldam import effective_number_weights, ldam, ldam_margins
from cibl_ray.losses.memory import ClassMeans, LabelledQueue
from cibl_ray.losses.paco import paco
from cibl_ray.losses.pairs import positive_counts, self_pairs, softmax
from cibl_ray.losses.proco import contrast_logits, probabilistic_contrastive
from cibl_ray.losses.psc import psc
from cibl_ray.losses.supcon import supcon
from cibl_ray.losses.vs import logit_scales, vs
from cibl_ray.networks.precision import at_least_float32
from tests.cibl_ray import plain_losses as plain
from tests.cibl_ray.plain_losses import (
    CLASSES,
    COUNTS,
    LABELS,
    WIDTH,
    Example,
    assert_same_gradients,
)

PRIOR = ClassPrior.of(COUNTS, torch.float64).log_prior
MARGINS = ldam_margins(COUNTS, 0.5)
LOSSES = {
    "cross_entropy": (lambda e: cross_entropy(e.logits, e.labels), lambda e: plain.cross_entropy(e.logits, e.labels)),
    "balanced_softmax": (
        lambda e: cross_entropy(adjust_logits(e.logits, PRIOR.to(at_least_float32(e.logits).dtype), 1.5), e.labels),
        lambda e: plain.cross_entropy(e.logits + 1.5 * torch.log(COUNTS.double() / COUNTS.sum()), e.labels),
    ),
    "ldam": (
        lambda e: ldam(e.logits, e.labels, MARGINS, 3.0),
        lambda e: plain.cross_entropy(
            e.logits - 3.0 * F.one_hot(e.labels, CLASSES) * (0.5 * (5 / COUNTS.double()) ** 0.25), e.labels
        ),
    ),
    "vs": (
        lambda e: vs(e.logits, e.labels, logit_scales(COUNTS, 0.3), PRIOR.to(at_least_float32(e.logits).dtype), 1.5),
        lambda e: plain.vs(e.logits, e.labels, 0.3, 1.5),
    ),
    "label_smoothing": (
        lambda e: smoothed_cross_entropy(e.logits, e.labels, class_smoothing(COUNTS, 0.4, 0.1)),
        lambda e: plain.label_smoothing(e.logits, e.labels, 0.4, 0.1, "concave"),
    ),
    "supcon": (
        lambda e: supcon(e.z, e.labels, e.contrast(), CLASSES, 0.1),
        lambda e: plain.supcon(e.z, e.labels, *e.everyone(), 0.1),
    ),
    "psc": (
        lambda e: psc(e.z, e.labels, e.prototypes, 0.1),
        lambda e: plain.psc(e.z, e.labels, e.prototypes, 0.1, positive_in_denominator=False),
    ),
    "psc_positive_in_denominator": (
        lambda e: psc(e.z, e.labels, e.prototypes, 0.1, positive_in_denominator=True),
        lambda e: plain.psc(e.z, e.labels, e.prototypes, 0.1, positive_in_denominator=True),
    ),
    "bcl": (
        lambda e: balanced_contrastive(e.z, e.labels, e.contrast(), e.prototypes, 0.1),
        lambda e: plain.balanced(e.z, e.labels, *e.everyone(), e.prototypes, 0.1),
    ),
    "paco": (
        lambda e: paco(e.logits, e.z, e.labels, e.contrast(), 0.07, 0.05, 1.0)["loss"],
        lambda e: plain.paco(e.logits, e.z, e.labels, *e.everyone(), 0.07, 0.05, 1.0).mean(),
    ),
    "cibl": (
        lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.1)["loss"],
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 0.3, 0.1, every=1),
    ),
    "cibl_first_view": (
        lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.1, classify_every=2)["loss"],
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 0.3, 0.1, every=2),
    ),
    "cibl_normalised_over_the_batch": (
        lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.1, normalization="batch")["loss"],
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 0.3, 0.1, 1, "batch"),
    ),
    "cibl_normalised_by_class": (
        lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.1, 2, "class")["loss"],
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 0.3, 0.1, 2, "class"),
    ),
}
CONTRASTIVE = [name for name in LOSSES if name.startswith(("supcon", "psc", "bcl", "paco", "cibl"))]


def relative(ours, reference):
    """The difference's norm by the reference's, 1e-9 of absolute difference let through where that is nothing."""
    reference = reference.detach()
    return float((ours.detach().double() - reference).norm() / reference.norm().clamp(min=1e-9))


def agree(ours, reference, precision):
    return relative(ours, reference) <= precision or (reference.norm() <= 1e-12 and ours.norm() <= 1e-6)


@pytest.mark.parametrize("precision", ["float64", "bf16"])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_formula_value_and_gradient(loss, name, queued, precision):
    """bf16: as in training, numbers of that precision held in float32, and the loss inside autocast too."""
    ours, formula = LOSSES[loss]
    tolerance = 1e-6 if precision == "float64" else 1e-3
    example = Example(name, torch.float64 if precision == "float64" else torch.bfloat16, queued)
    double = example.in_double()
    reference = formula(double)
    if precision == "bf16":
        assert agree(ours(example).double(), reference, tolerance)  # tensors of bf16 themselves
        example = example.in_float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = ours(example)
    assert agree(value.double(), reference, tolerance)
    # Positive weights, so that no gradient is a sum in which much cancels.
    weights = torch.rand(reference.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((value * weights).sum(), example.leaves, allow_unused=True)
    references = torch.autograd.grad((reference * weights).sum(), double.leaves, allow_unused=True)
    for mine, theirs in zip(gradients, references, strict=True):
        assert (mine is None) == (theirs is None)
        assert theirs is None or agree(mine.double(), theirs, tolerance)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name in CONTRASTIVE])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_change_nothing(loss, rows, monkeypatch):
    """With a block too small for the whole matrix, value and gradient stay the same."""
    ours, _ = LOSSES[loss]
    whole, blocked = Example("mixed", torch.float64, queued=True), Example("mixed", torch.float64, queued=True)
    value = ours(whole)
    gradients = torch.autograd.grad(value.sum(), whole.leaves, allow_unused=True)
    monkeypatch.setitem(softmax.KEEP, "cpu", 0)
    monkeypatch.setitem(softmax.BLOCK, "cpu", rows * 15)
    assert torch.allclose(ours(blocked), value, rtol=1e-12)
    again = torch.autograd.grad(ours(blocked).sum(), blocked.leaves, allow_unused=True)
    for mine, theirs in zip(again, gradients, strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("keep", [2**26, 0])
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_computes_the_same(loss, name, keep, queued, monkeypatch):
    for limits, limit in ((softmax.KEEP, keep), (self_pairs.AT_ONCE, keep), (self_pairs.TILE, 3)):
        monkeypatch.setitem(limits, "cuda", limit)
    ours, formula = LOSSES[loss]
    example, double = Example(name, torch.float64, queued), Example(name, torch.float64, queued).in_double()
    for part in ("logits", "z", "prototypes", "queue", "labels", "queue_labels"):
        tensor = getattr(example, part).detach().cuda()
        setattr(example, part, tensor.requires_grad_() if tensor.is_floating_point() and part != "queue" else tensor)
    monkeypatch.setattr(f"{__name__}.PRIOR", PRIOR.cuda())
    monkeypatch.setattr(f"{__name__}.MARGINS", MARGINS.cuda())
    value, reference = ours(example), formula(double)
    assert agree(value.double().cpu(), reference, 1e-6)
    mine = torch.autograd.grad(value.sum(), (example.logits, example.z, example.prototypes), allow_unused=True)
    wanted = torch.autograd.grad(reference.sum(), (double.logits, double.z, double.prototypes), allow_unused=True)
    for one, other in zip(mine, wanted, strict=True):
        assert (one is None) == (other is None)
        assert other is None or agree(one.cpu(), other, 1e-6)


@pytest.mark.parametrize(
    ("temperature", "tile", "keep"), [(0.1, None, 0), (0.1, 3, 0), (0.1, 16, 0), (0.02, None, 2**22), (0.02, None, 0)]
)
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("loss", ["supcon", "bcl", "paco", "cibl"])
def test_anchors_compared_with_themselves_have_both_gradients(loss, name, temperature, tile, keep, monkeypatch):
    """Where the contrast set is the very tensor of the anchors, as in training without a queue: all pairs at once, in tiles,
    and where the temperature asks for shifts, kept or in blocks of two rows."""
    monkeypatch.setitem(softmax.KEEP, "cpu", keep)
    monkeypatch.setitem(softmax.BLOCK, "cpu", 20)
    if tile is not None:
        monkeypatch.setitem(self_pairs.AT_ONCE, "cpu", 0)
        monkeypatch.setitem(self_pairs.TILE, "cpu", tile)
    e = Example(name, torch.float64, queued=False)
    contrast, everyone = ContrastSet(e.z, e.labels), (e.z, e.labels)
    ours, formula = {
        "supcon": (
            lambda: supcon(e.z, e.labels, contrast, CLASSES, temperature),
            lambda: plain.supcon(e.z, e.labels, *everyone, temperature),
        ),
        "bcl": (
            lambda: balanced_contrastive(e.z, e.labels, contrast, e.prototypes, temperature),
            lambda: plain.balanced(e.z, e.labels, *everyone, e.prototypes, temperature),
        ),
        "paco": (
            lambda: paco(e.logits, e.z, e.labels, contrast, temperature, 0.05, 1.0)["loss"],
            lambda: plain.paco(e.logits, e.z, e.labels, *everyone, temperature, 0.05, 1.0).mean(),
        ),
        "cibl": (
            lambda: cibl(e.logits, e.z, e.labels, contrast, 0.3, temperature)["loss"],
            lambda: plain.cibl(e.logits, e.z, e.labels, *everyone, 0.3, temperature, every=1),
        ),
    }[loss]
    values = ours(), formula()
    assert torch.allclose(*values, rtol=1e-9)
    weights = torch.rand(values[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same_gradients(*((value * weights).sum() for value in values), e.leaves, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("rows", "temperature"), [(0, 0.1), (1, 0.1), (1, 0.02)])
def test_one_row_or_none(rows, temperature):
    """Nothing to compare with is no error and no NaN: balanced contrastive learning has its prototypes, others give 0."""
    z = F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    prototypes = F.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1).double()
    labels = torch.arange(rows)
    contrast = ContrastSet(z, labels)
    losses = (
        supcon(z, labels, contrast, CLASSES, temperature),
        psc(z, labels, prototypes, temperature),
        balanced_contrastive(z, labels, contrast, prototypes, temperature),
    )
    for loss in losses:
        assert loss.shape == (rows,)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()
    if rows:
        reference = plain.balanced(z.double(), labels, z.double(), labels, prototypes, temperature)
        assert losses[2].item() == pytest.approx(reference.item(), rel=1e-4)


def test_blocks_keep_memory_below_the_square():
    """Beyond the block's size nothing of M x M is kept for the backward pass."""
    z = F.normalize(torch.randn(2500, 8), dim=1).requires_grad_()
    labels = torch.arange(2500) % 7
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        softmax.log_sum_exp(z, z, 0.1, exclude=torch.arange(2500))
        supcon(z, labels, ContrastSet(z, labels), 7, 0.1)
    assert kept
    assert max(kept) <= z.numel()


@pytest.mark.parametrize("loss", ["supcon", "psc", "bcl", "paco", "cibl"])
def test_memory_grows_like_the_batch_and_not_like_its_square(loss, monkeypatch):
    """Forward and backward, everything counted, beyond the threshold."""
    monkeypatch.setitem(softmax.KEEP, "cpu", 2**15)
    monkeypatch.setitem(softmax.BLOCK, "cpu", 2**13)
    monkeypatch.setitem(self_pairs.AT_ONCE, "cpu", 2**15)
    monkeypatch.setitem(self_pairs.TILE, "cpu", 64)
    held = []
    for size in (600, 1200):
        random = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 100, (size,), generator=random)
        leaves = [torch.randn(*shape, generator=random).requires_grad_() for shape in ((size, 16), (size, 100), (100, 16))]
        ours, _ = pairs(labels, 100)[loss]
        held.append(peak_bytes(lambda z, f, p, ours=ours: ours(F.normalize(z, dim=1), f, F.normalize(p, dim=1)), leaves))
    assert held[1] < 2.5 * held[0]
    assert held[1] < 4 * 1200**2 / 2


@pytest.mark.parametrize("loss", ["supcon", "bcl", "paco", "cibl"])
def test_two_workers_halves_add_up_to_the_whole(loss):
    """Each worker has half the anchors and all embeddings; values join, gradients of the shared embeddings add."""
    e = Example("mixed", torch.float64, queued=True)

    def half(start, stop, everyone):
        z, labels = everyone[start:stop], e.labels[start:stop]
        contrast = ContrastSet(everyone, torch.cat((e.labels, e.queue_labels)), start=start)
        match loss:
            case "supcon":
                return supcon(z, labels, contrast, CLASSES, 0.1).sum()
            case "bcl":
                return balanced_contrastive(z, labels, contrast, e.prototypes, 0.1).sum()
            case "paco":
                return paco(e.logits[start:stop], z, labels, contrast, 0.1, 0.05, 1.0)["loss"] * (stop - start)
            case _:
                return cibl(e.logits[start:stop], z, labels, contrast, 0.3, 0.1)["loss"] * (stop - start)

    def all_embeddings():
        return torch.cat((e.z, e.queue))

    whole = half(0, 10, all_embeddings())
    halves = half(0, 4, all_embeddings()) + half(4, 10, all_embeddings())
    assert halves.item() == pytest.approx(whole.item(), rel=1e-10)
    assert_same_gradients(halves, whole, e.leaves, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", [2**22, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("queued", [True, False])
def test_finite_where_features_coincide_and_temperature_is_low(queued, loss, dtype, keep, monkeypatch):
    """All embeddings and prototypes alike, τ = .02 in every loss that has one; value and gradient stay finite."""
    monkeypatch.setitem(softmax.KEEP, "cpu", keep)
    e = Example("a class without positives", dtype, queued=queued)
    alike = F.normalize(torch.ones(1, WIDTH, dtype=torch.float64), dim=1).to(dtype)
    e.z, e.prototypes = alike.repeat(10, 1).requires_grad_(), alike.repeat(CLASSES, 1).requires_grad_()
    e.queue = alike.repeat(len(e.queue), 1)
    value = (LOW_TEMPERATURE[loss] if loss in CONTRASTIVE else LOSSES[loss][0])(e)
    gradients = torch.autograd.grad(value.sum(), (e.logits, e.z, e.prototypes), allow_unused=True)
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


LOW_TEMPERATURE = {
    "supcon": lambda e: supcon(e.z, e.labels, e.contrast(), CLASSES, 0.02),
    "psc": lambda e: psc(e.z, e.labels, e.prototypes, 0.02),
    "psc_positive_in_denominator": lambda e: psc(e.z, e.labels, e.prototypes, 0.02, positive_in_denominator=True),
    "bcl": lambda e: balanced_contrastive(e.z, e.labels, e.contrast(), e.prototypes, 0.02),
    "paco": lambda e: paco(e.logits, e.z, e.labels, e.contrast(), 0.02, 0.05, 1.0)["loss"],
    "cibl": lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.02)["loss"],
    "cibl_first_view": lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.02, classify_every=2)["loss"],
    "cibl_normalised_over_the_batch": lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.02, 1, "batch")["loss"],
    "cibl_normalised_by_class": lambda e: cibl(e.logits, e.z, e.labels, e.contrast(), 0.3, 0.02, 2, "class")["loss"],
}


def test_finite_where_features_oppose_each_other_and_temperature_is_low():
    """A shift by anything but the row's own maximum would underflow: exp(-1/.02 - 1/.02)."""
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    loss = supcon(z, labels, ContrastSet(z, labels), 2, 0.01).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_tail_skew_zero_is_cross_entropy_to_the_bit():
    e = Example("mixed", torch.float32, queued=True)
    ours = cibl(e.logits, e.z, e.labels, e.contrast(), 0.0, 0.1)["loss"]
    classified = cross_entropy(e.logits, e.labels).mean()
    assert torch.equal(ours, classified)
    assert torch.equal(torch.autograd.grad(ours, e.logits)[0], torch.autograd.grad(classified, e.logits)[0])
    assert torch.equal(cibl(e.logits, e.z, e.labels, e.contrast(), 0.0, 0.1, normalization="batch")["loss"], classified)


def test_a_lone_sample_has_neither_loss_nor_gradient():
    z, labels = F.normalize(torch.randn(1, 8), dim=1).requires_grad_(), torch.tensor([3])
    loss = supcon(z, labels, ContrastSet(z, labels), 5, 0.1).sum()
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].count_nonzero() == 0


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_cross_entropy_is_that_of_torch(scale):
    logits, labels = (scale * torch.randn(64, 1000)).requires_grad_(), torch.randint(0, 1000, (64,))
    ours, torchs = cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skew", [1e6, 1e9])
def test_great_tail_skew_is_supcon_plus_the_remainder(skew):
    """λ → ∞: SupCon plus cross-entropy over λ·|P|; normalised, plus cross-entropy with weights ∝ 1/|P|, in float32 too."""
    e = Example("one class", torch.float64, queued=True)
    e.labels = torch.tensor([2, 2, 2, 2, 2, 2, 0, 0, 0, 0])
    positives = torch.tensor([7.0] * 6 + [4.0] * 4, dtype=torch.float64)  # with the queue's 0, 2, 2
    contrastive = supcon(e.z, e.labels, e.contrast(), CLASSES, 0.1)
    classified = F.cross_entropy(e.logits, e.labels, reduction="none")
    ours = cibl(e.logits, e.z, e.labels, e.contrast(), skew, 0.1)["loss"]
    remainder = (classified - contrastive) / (skew * positives)
    assert ours.item() == pytest.approx((contrastive + remainder).mean().item(), rel=1e-10)
    expected = contrastive.mean() + (classified / positives).sum() / (1 / positives).sum()
    for example in (e, e.in_float()):
        ours = cibl(example.logits, example.z, e.labels, example.contrast(), skew, 0.1, normalization="batch")["loss"]
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        slope = torch.autograd.grad(ours, example.logits)[0]
        wanted = torch.autograd.grad(expected, e.logits, retain_graph=True)[0]
        assert torch.allclose(slope.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("skew", "expected"),
    [(0.01, (0.63, 0.94, 0.98)), (0.05, (0.25, 0.75, 0.93)), (0.2, (0.08, 0.43, 0.76)), (1, (0.02, 0.13, 0.39))],
)
def test_weights_at_the_expected_number_of_positives(skew, expected):
    """Cross-entropy's weight for CIFAR-100-LT, batch 128, queue 1024: E|P| = 59.9 head, 6.7 middle, 1.6 tail."""
    weights = term_weights(torch.tensor([59.9, 6.7, 1.6]), skew)[1]
    assert weights.tolist() == pytest.approx(expected, abs=0.006)  # the table is rounded to .01


def test_positives_count_the_other_members_and_the_queue():
    labels = torch.tensor([0, 2, 0, 0, 5])
    assert positive_counts(labels, labels, 6).tolist() == [2, 0, 2, 2, 0]
    assert positive_counts(labels, torch.cat((labels, torch.tensor([5, 5, 1]))), 6).tolist() == [2, 0, 2, 2, 2]


def test_terms_are_named_and_detached():
    e = Example("mixed", torch.float32, queued=False)
    terms = cibl(e.logits, e.z, e.labels, e.contrast(), 0.05, 0.1)
    assert list(terms) == ["loss", "cross_entropy", "contrastive", "cross_entropy_weight"]
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]


def test_ldam_margins_and_weights():
    counts = torch.tensor([5000, 50])
    assert ldam_margins(counts, 0.5).tolist() == pytest.approx([0.5 * (50 / 5000) ** 0.25, 0.5])
    weights = [(1 - 0.99) / (1 - 0.99**count) for count in counts.tolist()]
    assert effective_number_weights(counts, 0.99).tolist() == pytest.approx([2 * w / sum(weights) for w in weights])


@pytest.mark.parametrize(("curve", "at_half"), [("parabolic", 0.75), ("linear", 0.5), ("cosine", 0.5), ("constant", 0.3)])
def test_curves_of_the_contrastive_share(curve, at_half):
    assert contrastive_share(curve, 0.5, 0.3) == pytest.approx(at_half)
    if curve != "constant":
        assert contrastive_share(curve, 0.0) == 1
        assert contrastive_share(curve, 1.0) == pytest.approx(0)
    assert contrastive_share("cosine", 0.25) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))


def test_queue_is_a_ring_that_never_shows_an_empty_slot():
    queue = LabelledQueue(5, 2, torch.device("cpu"))
    assert [len(part) for part in queue.content()] == [0, 0]
    pushed = torch.arange(14.0).view(7, 2)
    queue.push(pushed[:3], torch.tensor([7, 8, 9]))
    assert queue.content()[1].tolist() == [7, 8, 9]
    queue.push(pushed[3:6], torch.tensor([1, 2, 3]))
    embeddings, labels = queue.content()
    assert labels.tolist() == [3, 8, 9, 1, 2]
    assert torch.equal(embeddings[0], pushed[5])
    assert torch.equal(embeddings[1], pushed[1])
    restored = LabelledQueue(5, 2, torch.device("cpu"))
    restored.load(queue.state())
    for one in (queue, restored):
        one.push(pushed[6:], torch.tensor([4]))
        assert one.content()[1].tolist() == [3, 4, 9, 1, 2]
    queue.push(torch.ones(12, 2), torch.arange(12))  # more than it holds: the newest stay
    assert sorted(queue.content()[1].tolist()) == [7, 8, 9, 10, 11]


def test_vs_without_scales_is_balanced_softmax_and_smoothing_by_0_is_cross_entropy():
    e = Example("mixed", torch.float64, queued=False)
    balanced = cross_entropy(adjust_logits(e.logits, PRIOR, 1.0), e.labels)
    assert torch.equal(vs(e.logits, e.labels, logit_scales(COUNTS, 0.0), PRIOR, 1.0), balanced)
    unsmoothed = smoothed_cross_entropy(e.logits, e.labels, class_smoothing(COUNTS, 0.0, 0.0))
    assert torch.allclose(unsmoothed, cross_entropy(e.logits, e.labels), rtol=1e-12)


def test_equal_smoothing_is_torchs():
    """torch shares ε among all classes, the true one too: its ε is C/(C-1) of ours."""
    e = Example("mixed", torch.float64, queued=False)
    ours = smoothed_cross_entropy(e.logits, e.labels, class_smoothing(COUNTS, 0.11, 0.11))
    theirs = F.cross_entropy(e.logits, e.labels, reduction="none", label_smoothing=0.11 * CLASSES / (CLASSES - 1))
    assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("shape", ["concave", "linear", "convex"])
def test_smoothing_grows_from_the_tail_to_the_head(shape):
    smoothing = class_smoothing(COUNTS, 0.4, 0.1, shape)
    assert smoothing[[0, -1]].tolist() == pytest.approx([0.4, 0.1])
    assert (smoothing.diff() <= 0).all()
    assert class_smoothing(torch.tensor([7, 7, 7]), 0.4, 0.1, shape).tolist() == pytest.approx([0.4] * 3)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
@pytest.mark.parametrize(("width", "precision"), [(16, 1e-6), (32, 1e-7), (128, 1e-9)])
def test_proco_is_its_formula(width, precision, temperature):
    """Value and gradient, against the Bessel function's power series."""
    z, lengths = unit(9, width).requires_grad_(), torch.linspace(0.1, 0.9, CLASSES, dtype=torch.float64)
    means, labels = lengths[:, None] * unit(CLASSES, width, seed=1), torch.arange(9) % CLASSES
    ours = probabilistic_contrastive(z, labels, means, PRIOR, temperature, 0.8)
    reference = plain.proco(z, labels, means, temperature, 0.8)
    assert relative(ours, reference) < precision
    gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, reference)]
    assert relative(*gradients) < 10 * precision
    single = probabilistic_contrastive(z.float(), labels, means.float(), PRIOR.float(), temperature, 0.8)
    assert single.dtype == torch.float32
    assert relative(single, reference) < 1e-5


def test_procos_logits_are_the_expected_similarity():
    """E[exp(z·x/τ)], here by drawing x: means of many draws about a direction, normalised, are such a distribution."""
    width, concentration, temperature = 16, 30.0, 0.5
    mu, z = unit(1, width), unit(3, width, seed=3)
    # Importance sampling from the uniform distribution on the sphere.
    draws = unit(400_000, width, seed=4)
    weights = torch.exp(concentration * (draws @ mu[0] - 1))
    mean = (weights[:, None] * draws).sum(0) / weights.sum()
    # The length of a mean whose estimated concentration is the true one: κ = d·R/(1-R²).
    length = (-width + math.sqrt(width**2 + 4 * concentration**2)) / (2 * concentration)
    assert mean.norm().item() == pytest.approx(length, abs=0.03)  # the estimate is approximate
    expected = torch.log((weights[:, None] * torch.exp(draws @ z.T / temperature)).sum(0) / weights.sum())
    assert torch.allclose(contrast_logits(z, length * mu, temperature)[:, 0], expected, atol=0.03)


def test_proco_is_finite_where_a_class_has_one_embedding_or_none():
    z = unit(4, 16).float().requires_grad_()
    means = torch.stack((z[0].detach(), -z[1].detach(), torch.zeros(16)))
    loss = probabilistic_contrastive(z, torch.tensor([0, 1, 2, 0]), means, torch.zeros(3), 0.01).sum()
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_class_means_are_those_of_this_epoch_and_the_one_before():
    memory = ClassMeans(3, 16)
    unseen = memory.means.clone()
    assert torch.allclose(unseen.norm(dim=1), torch.full((3,), 0.9))
    batches = [(unit(6, 16, seed=seed).float(), torch.tensor([0, 0, 1, 0, 1, 1])) for seed in range(5)]
    for progress, (first, last) in ((0.0, (0, 2)), (0.1, (2, 3)), (0.2, (3, 5))):
        for z, labels in batches[first:last]:
            found = memory.take(z, labels, progress)
        since = {0.0: 0, 0.1: 0, 0.2: 2}[progress]
        seen, of = (torch.cat(part) for part in zip(*batches[since:last], strict=True))
        for label in range(2):
            assert torch.allclose(found[label], seen[of == label].mean(0), atol=1e-6)
        assert torch.equal(found[2], unseen[2])
