"""How much of a backbone is trained: blocks, frozen parts, and learning rates that fall towards the input."""

from __future__ import annotations

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(backbone: nn.Module) -> list[list[str]]:
    """The parts of a backbone from input to output, each as prefixes of the names of its parameters.

    The children of every `Sequential` or `ModuleList` at the top are a block each (the stages of an EfficientNet, the layers of
    a ViT). What stands before the first block belongs to the first, what follows the last to the last.
    """
    found: list[list[str]] = []
    before: list[str] = []
    for name, child in backbone.named_children():
        inner = [*child.named_children()] if isinstance(child, _CONTAINERS) else []
        if inner:
            for number, (part, _) in enumerate(inner):
                found.append([*(before if number == 0 else []), f"{name}.{part}."])
            before = []
        elif found:
            found[-1].append(f"{name}.")
        else:
            before.append(f"{name}.")
    if not found:
        return [[f"{name}."] for name, _ in backbone.named_children()] or [[""]]
    return found


def depth_of(name: str, parts: list[list[str]]) -> int:
    """Which of `parts` a parameter is in. A parameter of no child module, such as a class token, is in the first."""
    return next((number for number, prefixes in enumerate(parts) if name.startswith(tuple(prefixes))), 0)


def train_last(backbone: nn.Module, count: int) -> None:
    """Train the last `count` blocks and what follows them, and nothing before."""
    parts = blocks(backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(depth_of(name, parts) >= len(parts) - count)


def train_norms(backbone: nn.Module) -> None:
    """Train the scales and shifts of the normalisation layers alone. Their running statistics stay."""
    backbone.requires_grad_(False)
    for module in backbone.modules():
        if is_norm(module):
            module.requires_grad_(True)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: batch, layer, group norm, and the like."""
    return isinstance(module, (*BATCH_NORMS, nn.InstanceNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))


def frozen_modules(backbone: nn.Module, keep_statistics: bool = False) -> list[str]:
    """The modules to keep in evaluation mode, each by itself: a module within one of them may be trained.

    These are modules whose own parameters are frozen, all that lies in a frozen part (dropout and stochastic depth have no
    parameters), and norms with frozen neighbours: a norm whose own parameters are trained while the layers around it are frozen
    keeps its statistics, too.

    Args:
        backbone: With what is frozen.
        keep_statistics: Whether every norm with running statistics is among them.
    """
    trained = {name.rpartition(".")[0] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    only_norms = bool(trained) and all(is_norm(backbone.get_submodule(name)) for name in trained)
    still = dict[str, None]()
    for name, module in backbone.named_modules():
        own = [*module.parameters(recurse=False)]
        frozen = bool(own) and (name not in trained or (only_norms and is_norm(module)))
        if frozen or (keep_statistics and getattr(module, "running_mean", None) is not None):
            still[name] = None
        parameters = [*module.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            still |= dict.fromkeys(f"{name}.{inner}".strip(".") for inner, _ in module.named_modules())
    return list(still)
