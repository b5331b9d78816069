"""τ-normalisation of a trained linear head.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", 2020, section 4.2.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from cibl_ray.evaluation.tail_shift import choose
from cibl_ray.networks.modules import Head
from cibl_ray.networks.network import HybridNetwork
from cibl_ray.training.evaluator import Evaluator
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)

TAUS = tuple(round(step / 20, 2) for step in range(41))  # 0 to 2
_METRIC = "balanced"


def normalize_head(
    network: HybridNetwork, tau: float | Literal["auto"], evaluator: Evaluator, prepared: Prepared, world: World
) -> float:
    """τ-normalise a network's head. Every worker calls it.

    Args:
        network: The network, on the run's device. Its head changes.
        tau: τ; "auto": as is best for balanced accuracy on the validation split, where that is better than 0 beyond chance.
        evaluator: Of the run.
        prepared: The images.
        world: The workers.

    Returns:
        The τ that was taken.

    Raises:
        UserError: τ is to be chosen, and there is no validation split.
    """
    _fold_class_scale(network.head)
    if tau != "auto":
        tau_normalize(network.head, tau)
        return tau
    if "val" not in prepared.splits:
        raise UserError(
            "train.tau 'auto' chooses on validation images, and the data have none; set data.val_fraction, or give train.tau a "
            "number"
        )
    logits, labels = evaluator.predict(network, "val")

    def chosen() -> float:
        factors, plain = _factors(network.head).cpu(), logits - _of_bias(network.head).cpu()

        def with_tau(tau: float) -> torch.Tensor:
            return plain * factors**tau if tau else logits

        best, before, after = choose(with_tau, TAUS, labels, prepared.train_counts, _METRIC)
        log.info(
            "τ = %g: %s accuracy %.1f -> %.1f %% on %d validation images",
            best, _METRIC, 100 * before, 100 * after, len(labels),
        )  # fmt: skip
        return best

    found: float = world.broadcast_from_rank0(chosen)
    tau_normalize(network.head, found)
    return found


@torch.no_grad()
def tau_normalize(head: Head, tau: float) -> None:
    """Scale the weights of each class by a power of their norm, w_c / ‖w_c‖^τ (Kang et al. 2020, equation 4).

    All are multiplied by the geometric mean of the norms to the power τ, too. That changes no answer, and it keeps the size of
    the logits, and so the probabilities. As in the paper there is no bias then.

    Args:
        head: A linear head, which is changed.
        tau: 0 changes nothing; 1 gives all classes the same norm.
    """
    if tau == 0:
        return
    _fold_class_scale(head)
    head.weight.mul_((_factors(head) ** tau)[:, None])
    if head.bias is not None:
        head.bias.zero_()


@torch.no_grad()
def _fold_class_scale(head: Head) -> None:
    """Multiply the factors of the classes' logits into weights and bias: what h is multiplied by has these norms."""
    if head.class_scale is None:
        return
    head.weight.mul_(head.class_scale[:, None])
    if head.bias is not None:
        head.bias.mul_(head.class_scale)
    head.class_scale.fill_(1)


def _of_bias(head: Head) -> torch.Tensor:
    """What the bias adds to the logits, where the classes' factors are folded in."""
    return torch.zeros(()) if head.bias is None else head.bias.detach()


@torch.no_grad()
def _factors(head: Head) -> torch.Tensor:
    """The geometric mean of the norms of the classes' weights, over each class's: (C,)."""
    norms = head.weight.norm(dim=1).clamp(min=1e-12)
    return norms.log().mean().exp() / norms
