"""The losses as plain loops, written from their formulas; and a small example to hold ours against them."""

import math

import torch
import torch.nn.functional as F

from cibl_ray.losses.inputs import ContrastSet

CLASSES, WIDTH, QUEUED = 12, 7, 5  # more classes than the ten anchors
COUNTS = torch.tensor([500, 300, 200, 90, 60, 40, 20, 10, 8, 6, 5, 5])
LOG_PRIOR = (COUNTS.double() / COUNTS.sum()).log()
LABELS = {
    "mixed": [0, 0, 0, 1, 1, 2, 2, 0, 1, 0],
    "a class without positives": [0, 0, 0, 1, 1, 1, 3, 0, 1, 0],
    "one class": [2] * 10,
    "no positives at all": list(range(10)),
}


def others_of(m, count):
    return [a for a in range(count) if a != m]


def supcon(z, labels, everyone, all_labels, temperature):
    """The anchors z are the first rows of `everyone`."""
    losses = []
    for m in range(len(z)):
        others = others_of(m, len(everyone))
        denominator = sum(torch.exp(z[m] @ everyone[a] / temperature) for a in others)
        positives = [a for a in others if all_labels[a] == labels[m]]
        terms = [torch.log(torch.exp(z[m] @ everyone[p] / temperature) / denominator) for p in positives]
        losses.append(-sum(terms) / len(terms) if terms else z.sum() * 0)
    return torch.stack(losses)


def psc(z, labels, prototypes, temperature, positive_in_denominator):
    losses = []
    for m, label in enumerate(labels.tolist()):
        similar = torch.exp(prototypes @ z[m] / temperature)
        denominator = sum(similar[j] for j in range(len(prototypes)) if positive_in_denominator or j != label)
        losses.append(-torch.log(similar[label] / denominator))
    return torch.stack(losses)


def balanced(z, labels, everyone, all_labels, prototypes, temperature):
    losses = []
    for m, label in enumerate(labels.tolist()):
        members = {
            c: [everyone[a] for a in others_of(m, len(everyone)) if all_labels[a] == c] + [prototypes[c]]
            for c in range(len(prototypes))
        }
        denominator = sum(sum(torch.exp(z[m] @ x / temperature) for x in of) / len(of) for of in members.values())
        terms = [torch.log(torch.exp(z[m] @ p / temperature) / denominator) for p in members[label]]
        losses.append(-sum(terms) / len(terms))
    return torch.stack(losses)


def paco(logits, z, labels, everyone, all_labels, temperature, alpha, beta):
    losses = []
    for m, label in enumerate(labels.tolist()):
        others = others_of(m, len(everyone))
        similar = {a: torch.exp(z[m] @ everyone[a] / temperature) for a in others}
        denominator = sum(similar.values()) + sum(torch.exp(f) for f in logits[m])
        positives = [a for a in others if all_labels[a] == label]
        total = beta * torch.log(torch.exp(logits[m, label]) / denominator)
        total = total + alpha * sum(torch.log(similar[p] / denominator) for p in positives)
        losses.append(-total / (beta + alpha * len(positives)))
    return torch.stack(losses)


def log_bessel(order, x):
    """log I_ν(x) by its power series, Σ_k (x/2)^(2k+ν) / (k! Γ(k+ν+1))."""
    k = torch.arange(2000, dtype=torch.float64)
    return torch.logsumexp((2 * k + order) * torch.log(x / 2) - torch.lgamma(k + 1) - torch.lgamma(k + order + 1), 0)


def proco(z, labels, means, temperature, kappa):
    """-log of π_y·C(κ_y)/C(κ~_y) over the sum of these of all classes, C(κ) ∝ κ^ν / I_ν(κ)."""
    order, losses = z.shape[1] / 2 - 1, []
    for x, label in zip(z, labels.tolist(), strict=True):
        logs = []
        for c, mean in enumerate(means):
            length = mean.norm()
            concentration = z.shape[1] * length / (1 - length**2)
            other = (concentration * mean / length + x / temperature).norm()
            log_c = [order * torch.log(value) - log_bessel(order, value) for value in (concentration, other)]
            logs.append(kappa * LOG_PRIOR[c] + log_c[0] - log_c[1])
        losses.append(torch.logsumexp(torch.stack(logs), 0) - logs[label])
    return torch.stack(losses)


def cross_entropy(logits, labels):
    return torch.stack([-torch.log(torch.exp(f[y]) / sum(torch.exp(f))) for f, y in zip(logits, labels.tolist(), strict=True)])


def vs(logits, labels, gamma, kappa):
    counts, losses = COUNTS.tolist(), []
    for f, y in zip(logits, labels.tolist(), strict=True):
        moved = [(n / max(counts)) ** gamma * f[c] + kappa * math.log(n / sum(counts)) for c, n in enumerate(counts)]
        losses.append(-torch.log(torch.exp(moved[y]) / sum(torch.exp(x) for x in moved)))
    return torch.stack(losses)


def scaled(logits, gamma):
    return torch.stack(
        [f[c] * (n / int(COUNTS.max())) ** gamma for f in logits for c, n in enumerate(COUNTS.tolist())]
    ).reshape(logits.shape)


def label_smoothing(logits, labels, head, tail, shape):
    losses = []
    for f, y in zip(logits, labels.tolist(), strict=True):
        share = (int(COUNTS[y]) - int(COUNTS.min())) / (int(COUNTS.max()) - int(COUNTS.min()))
        # As Zhong et al. write them: the convex one by a sine from 3π/2 on.
        epsilon = {
            "concave": tail + (head - tail) * math.sin(math.pi * share / 2),
            "linear": tail + (head - tail) * share,
            "convex": head + (head - tail) * math.sin(3 * math.pi / 2 + math.pi * share / 2),
        }[shape]
        target = [1 - epsilon if c == y else epsilon / (CLASSES - 1) for c in range(CLASSES)]
        total = sum(torch.exp(f))
        losses.append(-sum(share_of * torch.log(torch.exp(f[c]) / total) for c, share_of in enumerate(target)))
    return torch.stack(losses)


def cibl(logits, z, labels, everyone, all_labels, tail_skew, temperature, every, normalization="none", expected=False):
    contrastive = supcon(z, labels, everyone, all_labels, temperature)
    classified = cross_entropy(logits, labels)
    rows = range(0, len(z), every)
    weights = []
    for m in range(len(z)):
        positives = sum(int(all_labels[a] == labels[m]) for a in others_of(m, len(everyone)))
        if expected:
            positives = (len(everyone) - 1) * int(COUNTS[labels[m]]) / int(COUNTS.sum())
        weights.append(tail_skew * positives / (1 + tail_skew * positives))
    if normalization == "class":
        loss, present = 0, sorted(set(labels.tolist()))
        for c in present:
            members = [m for m in range(len(z)) if labels[m] == c]
            loss = loss + sum(weights[m] * contrastive[m] for m in members) / len(members) / len(present)
            # Of the first views alone: every class has the same share of them as of all views.
            seen = sum((1 - weights[m]) * classified[m] for m in members if m in rows)
            loss = loss + seen * every / len(members) / len(present)
        return loss
    scale = sum(1 - weights[m] for m in rows) / len(rows) if normalization == "batch" else 1
    attracted = sum(weights[m] * contrastive[m] for m in range(len(z))) / len(z)
    return attracted + sum((1 - weights[m]) * classified[m] for m in rows) / len(rows) / scale


class Example:
    """Ten anchors, logits, prototypes and a queue, drawn in float64 and rounded to `dtype`; leaves to differentiate by."""

    def __init__(self, name, dtype, queued):
        random = torch.Generator().manual_seed(0)

        def draw(*shape):
            drawn = torch.randn(*shape, generator=random, dtype=torch.float64)
            return drawn if len(shape) < 2 else F.normalize(drawn, dim=1)

        rounded = [x.to(dtype) for x in (3 * draw(10, CLASSES), draw(10, WIDTH), draw(CLASSES, WIDTH), draw(QUEUED, WIDTH))]
        self.queue = rounded.pop()
        self.leaves = [x.requires_grad_() for x in rounded]
        self.logits, self.z, self.prototypes = self.leaves
        self.labels = torch.tensor(LABELS[name])
        self.queue_labels = torch.tensor([0, 2, 2, 7, 11])
        if not queued:
            self.queue, self.queue_labels = self.queue[:0], self.queue_labels[:0]

    def everyone(self):
        return torch.cat((self.z, self.queue)), torch.cat((self.labels, self.queue_labels))

    def contrast(self):
        """Without a queue the anchors are the very tensor of the set, as in training."""
        return ContrastSet(*self.everyone()) if len(self.queue) else ContrastSet(self.z, self.labels)

    def in_double(self):
        return self._in(torch.float64)

    def in_float(self):
        return self._in(torch.float32)

    def _in(self, dtype):
        """The same numbers, leaves of their own."""
        other = object.__new__(Example)
        other.leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        other.logits, other.z, other.prototypes = other.leaves
        other.labels, other.queue, other.queue_labels = self.labels, self.queue.to(dtype), self.queue_labels
        return other


def assert_same_gradients(one, other, leaves, rtol, atol, share=0.0):
    """Two scalars have the same gradients by all leaves, up to `atol` and `share` of a gradient's largest element."""
    ours, theirs = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (one, other))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            assert torch.allclose(mine, wanted, rtol=rtol, atol=atol + share * float(wanted.abs().max()))
