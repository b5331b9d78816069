"""What each configuration composes of the losses, against plain float64 loops: value, gradient, and the terms by name."""

from dataclasses import replace

import pytest
import torch

from cibl_ray.config import load_config
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs
from tests.cibl_ray import plain_losses as plain
from tests.cibl_ray.plain_losses import (
    CLASSES,
    COUNTS,
    LABELS,
    LOG_PRIOR,
    Example,
    assert_same_gradients,
)

SECOND = torch.tensor([11, 10, 3, 0, 7, 5])  # labels of the classifier's own stream
SCALE = 4.0


def second_logits(e):
    """Six rows made of the example's own, so that their gradient arrives at the same leaves."""
    return e.logits[:6] * torch.linspace(0.5, 1.5, 6, dtype=torch.float64)[:, None]


def ldam(e, weights):
    margins = 0.5 * (5 / COUNTS.double()) ** 0.25
    lowered = e.logits - SCALE * torch.nn.functional.one_hot(e.labels, CLASSES) * margins
    each = plain.cross_entropy(lowered, e.labels)
    weighed = [weights[label] * loss for label, loss in zip(e.labels.tolist(), each, strict=True)]
    return sum(weighed) / sum(weights[label] for label in e.labels.tolist())


def hybrid(share, contrastive, e, kappa):
    return share * contrastive.mean() + (1 - share) * plain.cross_entropy(second_logits(e) + kappa * LOG_PRIOR, SECOND).mean()


EFFECTIVE = [(1 - 0.99) / (1 - 0.99**count) for count in COUNTS.tolist()]
# Configuration, t/T, and the loss as a loop.
CASES = {
    "cross_entropy": ("{kind: cross_entropy}", 0.5, lambda e: plain.cross_entropy(e.logits, e.labels).mean()),
    "balanced_softmax": (
        "{kind: balanced_softmax, kappa: 0.7}", 0.5, lambda e: plain.cross_entropy(e.logits + 0.7 * LOG_PRIOR, e.labels).mean(),
    ),
    "ldam, before its re-weighting": ("{kind: ldam, beta: 0.99}", 0.5, lambda e: ldam(e, [1] * CLASSES)),
    "ldam, re-weighted": ("{kind: ldam, beta: 0.99}", 0.9, lambda e: ldam(e, EFFECTIVE)),
    "vs": ("{kind: vs, logit_gamma: 0.2, kappa: 0.8}", 0.5, lambda e: plain.vs(e.logits, e.labels, 0.2, 0.8).mean()),
    "label_smoothing, concave": (
        "{kind: label_smoothing}", 0.5, lambda e: plain.label_smoothing(e.logits, e.labels, 0.4, 0.1, "concave").mean(),
    ),
    "label_smoothing, linear, with the prior": (
        "{kind: label_smoothing, head_smoothing: 0.3, tail_smoothing: 0, smoothing_shape: linear, kappa: 1}", 0.5,
        lambda e: plain.label_smoothing(e.logits + LOG_PRIOR, e.labels, 0.3, 0, "linear").mean(),
    ),
    "label_smoothing, convex": (
        "{kind: label_smoothing, smoothing_shape: convex}", 0.5,
        lambda e: plain.label_smoothing(e.logits, e.labels, 0.4, 0.1, "convex").mean(),
    ),
    "supcon": (
        "{kind: supcon}", 0.5,
        lambda e: plain.supcon(e.z, e.labels, *e.everyone(), 0.1).mean() + plain.cross_entropy(e.logits, e.labels).mean(),
    ),
    "psc": (
        "{kind: psc, positive_in_denominator: true}", 0.5,
        lambda e: plain.psc(e.z, e.labels, e.prototypes, 0.1, True).mean() + plain.cross_entropy(e.logits, e.labels).mean(),
    ),
    "hybrid_sc, parabolic": (
        "{kind: hybrid_sc}", 0.5, lambda e: hybrid(0.75, plain.supcon(e.z, e.labels, *e.everyone(), 0.1), e, 0),
    ),
    "hybrid_sc, constant, with the prior": (
        "{kind: hybrid_sc, curve: constant, share: 0.2, kappa: 1}", 0.9,
        lambda e: hybrid(0.2, plain.supcon(e.z, e.labels, *e.everyone(), 0.1), e, 1),
    ),
    "hybrid_psc, linear": (
        "{kind: hybrid_psc, curve: linear, temperature: 0.5}", 0.9,
        lambda e: hybrid(0.1, plain.psc(e.z, e.labels, e.prototypes, 0.5, False), e, 0),
    ),
    "bcl": (
        "{kind: bcl}", 0.5,
        lambda e: 0.6 * plain.balanced(e.z, e.labels, *e.everyone(), e.prototypes, 0.1).mean()
        + 2.0 * plain.cross_entropy(e.logits + LOG_PRIOR, e.labels).mean(),
    ),
    "bcl, cross-entropy on the first views": (
        "{kind: bcl, classify: first, contrastive_weight: 0.3}", 0.5,
        lambda e: 0.3 * plain.balanced(e.z, e.labels, *e.everyone(), e.prototypes, 0.1).mean()
        + 2.0 * plain.cross_entropy(e.logits + LOG_PRIOR, e.labels)[::2].mean(),
    ),
    "paco": (
        "{kind: paco, alpha: 0.02, beta: 0.9}", 0.5,
        lambda e: plain.paco(e.logits + LOG_PRIOR, e.z, e.labels, *e.everyone(), 0.07, 0.02, 0.9).mean(),
    ),
    "cibl": (
        "{kind: cibl, tail_skew: 0.3, kappa: 0.5, classify: first}", 0.5,
        lambda e: plain.cibl(e.logits + 0.5 * LOG_PRIOR, e.z, e.labels, *e.everyone(), 0.3, 0.1, 2),
    ),
    "cibl, normalised over the batch": (
        "{kind: cibl, tail_skew: 2, normalize: true}", 0.5,
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 2, 0.1, 1, "batch"),
    ),
    "cibl, normalised by class": (
        "{kind: cibl, tail_skew: 2, normalize: class}", 0.5,
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 2, 0.1, 1, "class"),
    ),
    "cibl, expected numbers of a class": (
        "{kind: cibl, tail_skew: 2, count: expected}", 0.5,
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 2, 0.1, 1, expected=True),
    ),
    "cibl, expected numbers of a class, normalised over the batch": (
        "{kind: cibl, tail_skew: 2, count: expected, normalize: batch, classify: first}", 0.5,
        lambda e: plain.cibl(e.logits, e.z, e.labels, *e.everyone(), 2, 0.1, 2, "batch", expected=True),
    ),
    "cibl, logits scaled as in VS": (
        "{kind: cibl, tail_skew: 0.3, kappa: 0.5, logit_gamma: 0.2}", 0.5,
        lambda e: plain.cibl(plain.scaled(e.logits, 0.2) + 0.5 * LOG_PRIOR, e.z, e.labels, *e.everyone(), 0.3, 0.1, 1),
    ),
}  # fmt: skip


def inputs(e):
    return LossInputs(
        logits=e.logits, labels=e.labels, all_labels=e.labels, views=2, embeddings=e.z, contrast=e.contrast(),
        prototypes=e.prototypes, scale=SCALE, second_stream=(second_logits(e), SECOND),
    )  # fmt: skip


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("case", CASES)
def test_a_configuration_composes_what_its_formula_says(case, name, queued):
    text, progress, formula = CASES[case]
    head = ["--head", "{kind: cosine}"] if "ldam" in text else []
    config = load_config("quickstart", ["--loss", text, *head]).loss
    e = Example(name, torch.float64, queued)
    terms = config.terms(inputs(e), ClassPrior.of(COUNTS, torch.float64), progress)
    reference = formula(e)
    assert terms["loss"].item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(terms["loss"], reference, e.leaves, rtol=1e-6, atol=1e-10)
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_the_terms_of_paco_add_up_to_its_loss(name, queued):
    """Where all anchors have as many positives, the loss is their mean, weighed by β and α·|P|."""
    e = Example(name, torch.float64, queued)
    alpha, beta = 0.02, 0.9
    config = load_config("quickstart", ["--loss", f"{{kind: paco, alpha: {alpha}, beta: {beta}}}"]).loss
    terms = config.terms(inputs(e), ClassPrior.of(COUNTS, torch.float64), 0.5)
    assert list(terms) == ["loss", "center", "contrastive"]
    center = plain.paco(e.logits + LOG_PRIOR, e.z, e.labels, *e.everyone(), 0.07, 0.0, 1.0).mean()
    assert terms["center"].item() == pytest.approx(center.item(), rel=1e-6)
    labels = e.everyone()[1]
    positives = {int((labels == label).sum()) - 1 for label in e.labels.tolist()}
    if len(positives) == 1:
        (count,) = positives
        whole = (beta * terms["center"] + alpha * count * terms["contrastive"]) / (beta + alpha * count)
        assert terms["loss"].item() == pytest.approx(whole.item(), rel=1e-6)
    else:
        assert 0 < terms["contrastive"].item() < 1000


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_the_terms_of_pacos_workers_add_up_to_the_batchs(name, queued):
    """Also where anchors with positives are not shared out as the batch is."""
    e = Example(name, torch.float64, queued)
    config = load_config("quickstart", ["--loss", "{kind: paco}"]).loss
    prior = ClassPrior.of(COUNTS, torch.float64)
    whole = config.terms(inputs(e), prior, 0.5)
    sums = dict.fromkeys(whole, 0.0)
    for start, stop in ((0, 3), (3, 10)):
        rows = slice(start, stop)
        own = replace(inputs(e), logits=e.logits[rows], labels=e.labels[rows], embeddings=e.z[rows])
        terms = config.terms(replace(own, contrast=ContrastSet(*e.everyone(), start)), prior, 0.5)
        sums = {key: sums[key] + (stop - start) / 10 * terms[key].item() for key in sums}
    assert sums == pytest.approx({key: term.item() for key, term in whole.items()}, rel=1e-9)


@pytest.mark.parametrize(
    "flags",
    [
        ["--head", "{kind: cosine}"],
        ["--schedule", "{kind: steps}", "--gamma", "0.5"],
        ["--head", "{kind: cosine, scale: {start: 1, end: 2, shape: linear}}", "--shape", "cosine"],
    ],
)
def test_no_field_of_a_loss_takes_a_short_flag_from_another_part(flags):
    load_config("quickstart", flags)
