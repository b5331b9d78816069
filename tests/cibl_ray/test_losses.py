"""CIBL against a plain float64 loop written from the formula, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from cibl_ray.losses.cibl import cibl, contrastive_weight
from cibl_ray.losses.contrastive import positive_counts, supcon


def plain_supcon(z, labels, temperature):
    losses = []
    for m in range(len(z)):
        others = [a for a in range(len(z)) if a != m]
        positives = [a for a in others if labels[a] == labels[m]]
        denominator = torch.stack([torch.exp(z[m] @ z[a] / temperature) for a in others]).sum()
        terms = [torch.log(torch.exp(z[m] @ z[p] / temperature) / denominator) for p in positives]
        losses.append(-torch.stack(terms).mean() if terms else z.sum() * 0)
    return torch.stack(losses)


def plain_cibl(logits, z, labels, tail_skew, temperature):
    contrastive = plain_supcon(z, labels, temperature)
    total = torch.zeros((), dtype=logits.dtype)
    for m in range(len(z)):
        positives = sum(int(labels[a] == labels[m]) for a in range(len(z)) if a != m)
        weight = tail_skew * positives / (1 + tail_skew * positives)
        cross_entropy = -torch.log_softmax(logits[m], 0)[labels[m]]
        total = total + (1 - weight) * cross_entropy + weight * contrastive[m]
    return total / len(z)


LABELS = {
    "mixed": [0, 0, 0, 1, 1, 2, 2, 0, 1, 0],
    "a class without positives": [0, 0, 0, 1, 1, 1, 3, 0, 1, 0],
    "one class": [2] * 10,
    "no positives at all": list(range(10)),
}


def example(name, dtype, classes=12, size=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, classes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    raw = torch.randn(10, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return logits, raw, torch.tensor(LABELS[name])


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("tail_skew", [0.0, 0.05, 5.0])
def test_cibl_is_the_formula_value_and_gradient(name, tail_skew):
    logits, raw, labels = example(name, torch.float64)
    ours = cibl(logits, F.normalize(raw, dim=1), labels, tail_skew, 0.1)["loss"]
    reference = plain_cibl(logits, F.normalize(raw, dim=1), labels, tail_skew, 0.1)
    # The weights are float32, so is the agreement.
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (logits, raw)), torch.autograd.grad(reference, (logits, raw)), strict=True
    ):
        assert (mine - theirs).norm() <= 1e-6 * max(theirs.norm().item(), 1e-12)


@pytest.mark.parametrize("name", LABELS)
def test_supcon_is_the_formula_in_float64(name):
    _, raw, labels = example(name, torch.float64)
    z = F.normalize(raw, dim=1)
    ours, reference = supcon(z, labels, 12, 0.07), plain_supcon(z, labels, 0.07)
    assert torch.allclose(ours, reference, rtol=1e-9, atol=1e-9)


def test_tail_skew_zero_is_cross_entropy_to_the_bit():
    logits, raw, labels = example("mixed", torch.float32)
    ours = cibl(logits, F.normalize(raw, dim=1), labels, 0.0, 0.1)["loss"]
    plain = F.cross_entropy(logits, labels, reduction="none").mean()
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(plain, logits)[0])


def test_great_tail_skew_is_supcon_plus_cross_entropy_over_its_positives():
    logits, raw, labels = example("one class", torch.float64)
    z = F.normalize(raw, dim=1)
    skew = 1e6
    ours = cibl(logits, z, labels, skew, 0.1)["loss"]
    remainder = F.cross_entropy(logits, labels, reduction="none") / (skew * 9)
    assert ours.item() == pytest.approx((supcon(z, labels, 12, 0.1) + remainder).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("skew", "expected"),
    [(0.01, (0.63, 0.94, 0.98)), (0.05, (0.25, 0.75, 0.93)), (0.2, (0.08, 0.43, 0.76)), (1, (0.02, 0.13, 0.39))],
)
def test_weights_at_the_expected_number_of_positives(skew, expected):
    """Cross-entropy's weight for CIFAR-100-LT, batch 128, queue 1024: E|P| = 59.9 head, 6.7 middle, 1.6 tail."""
    weights = 1 - contrastive_weight(torch.tensor([59.9, 6.7, 1.6]), skew)
    assert weights.tolist() == pytest.approx(expected, abs=0.011)


def test_positives_count_the_other_members():
    assert positive_counts(torch.tensor([0, 2, 0, 0, 5]), 6).tolist() == [2, 0, 2, 2, 0]


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_finite_where_features_coincide_and_temperature_is_low(temperature):
    raw = torch.ones(8, 4, requires_grad=True)
    logits = torch.zeros(8, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 0])
    loss = cibl(logits, F.normalize(raw, dim=1), labels, 0.5, temperature)["loss"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_terms_are_named_and_detached():
    logits, raw, labels = example("mixed", torch.float32)
    terms = cibl(logits, F.normalize(raw, dim=1), labels, 0.05, 0.1)
    assert list(terms) == ["loss", "cross_entropy", "contrastive", "cross_entropy_weight"]
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]
