"""What is frozen stays as it was, and learning rates fall towards the input."""

import pytest
import torch
from torch import nn

from cibl_ray.config import OptimizerConfig, load_config
from cibl_ray.hardware import resolve
from cibl_ray.networks.config import LastBlocks, Needs, NetworkConfig, Norms
from cibl_ray.networks.depth import blocks, depth_of
from cibl_ray.networks.network import build_network
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.trainer import Trainer


def small():
    return build_network(NetworkConfig(backbone="resnet20"), 4, Needs(), seed=0)


def test_blocks_go_from_input_to_output():
    network = small().backbone
    parts = blocks(network)
    assert len(parts) == 9
    names = [name for name, _ in network.named_parameters()]
    assert depth_of("conv.weight", parts) == 0
    assert depth_of("blocks.8.conv2.weight", parts) == 8
    assert [depth_of(name, parts) for name in names] == sorted(depth_of(name, parts) for name in names)
    plain = nn.Sequential()
    plain.add_module("conv", nn.Conv2d(3, 4, 3))
    plain.add_module("last", nn.Conv2d(4, 4, 3))
    assert blocks(plain) == [["conv."], ["last."]]


@pytest.mark.parametrize(("partial", "moves"), [(LastBlocks(count=2), "blocks.7. blocks.8."), (Norms(kind="norms"), "bn")])
def test_frozen_parts_keep_weights_and_statistics(digits, tmp_path, partial, moves):
    flags = ["--tune", "partial", "--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--backbone", "resnet20"]
    config = resolve(load_config("quickstart", [*flags, "--train.partial", partial.model_dump_json()]))
    run = Trainer(config, digits, tmp_path)
    before = {name: value.clone() for name, value in run.network.backbone.state_dict().items()}
    run.train_epoch()
    changed = {name for name, value in run.network.backbone.state_dict().items() if not torch.equal(value, before[name])}
    if isinstance(partial, LastBlocks):
        assert changed == {name for name in before if name.startswith(tuple(moves.split()))}
        assert "blocks.8.bn1.running_mean" in changed
    else:
        assert changed == {
            name for name in before if moves in name and name.endswith((".weight", ".bias"))
        }  # and no running statistics


def test_adamw_spares_norms_and_biases_and_rates_fall_towards_the_input():
    network = small()
    optimizer = make_optimizer(network, OptimizerConfig(kind="adamw", lr=1.0, weight_decay=0.5, layer_decay=0.5), False)
    place = {id(parameter): name for name, parameter in network.named_parameters()}
    of = {place[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}
    assert of.keys() == dict(network.named_parameters()).keys()
    assert (of["head.weight"]["scale"], of["head.weight"]["weight_decay"]) == (1.0, 0.5)
    assert of["head.bias"]["weight_decay"] == of["backbone.blocks.0.bn1.weight"]["weight_decay"] == 0
    assert of["backbone.blocks.8.conv1.weight"]["scale"] == 0.5
    assert of["backbone.conv.weight"]["scale"] == of["backbone.blocks.0.conv1.weight"]["scale"] == 0.5**9


def test_sgd_decays_all_weights_as_before():
    network = small()
    optimizer = make_optimizer(network, OptimizerConfig(), False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]
    frozen = small()
    frozen.freeze("head", LastBlocks())
    names = {id(parameter) for parameter in frozen.head.parameters()}
    assert {id(p) for group in make_optimizer(frozen, OptimizerConfig(), False).param_groups for p in group["params"]} == names
