"""Low-rank adapters of a frozen backbone, by the library peft."""

from __future__ import annotations

from torch import nn

from pipelines.common.errors import UserError


class AdaptedBackbone:
    """A backbone whose layers have low-rank adapters: W + α/r · B·A, of which A and B are trained (Hu et al. 2021).

    Linear layers and convolutions have them. Grouped convolutions, depthwise ones among them, stay frozen without: a depthwise
    filter has few weights, and an adapter of it cannot be merged.

    Args:
        backbone: It is changed in place. The adapters change nothing of what it computes before they are trained.
        rank: r.
        alpha: α.

    Raises:
        UserError: peft is not installed, or the backbone has no layer for adapters.
    """

    def __init__(self, backbone: nn.Module, rank: int, alpha: float) -> None:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise UserError(
                "train.partial kind 'adapters' needs the package peft; install it: pip install 'cibl-ray[adapters]'"
            ) from error
        names = [name for name, module in backbone.named_modules() if _takes_adapter(module)]
        if not names:
            raise UserError("train.partial kind 'adapters': the backbone has no linear layer and no plain convolution")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, bias="none")  # type: ignore[arg-type]
        self._adapted = LoraModel(backbone, config, "default")

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt, and remove them: the backbone is what it was built as."""
        self._adapted.merge_and_unload()


def _takes_adapter(module: nn.Module) -> bool:
    """Whether a layer can have an adapter that can be merged. Subclasses may compute something else, such as other padding."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return type(module) is nn.Linear
