"""Networks have the field's sizes, and start from the seed."""

import pytest
import torch
import torch.nn.functional as F

from cibl_ray.networks.config import Needs, NetworkConfig
from cibl_ray.networks.heads.cosine import CosineHeadConfig, ScaleConfig
from cibl_ray.networks.modules import Head
from cibl_ray.networks.network import build_network


def parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("backbone", "size", "expected"),
    [("resnet20", 32, 269_722 + 0), ("resnet32", 32, 464_154), ("resnet50", 64, 23_528_522), ("resnext50", 64, 23_000_394)],
)
def test_sizes_and_shapes(backbone, size, expected):
    network = build_network(NetworkConfig(backbone=backbone), classes=10, needs=Needs(projection=False), seed=0)
    assert parameters(network) == expected
    network.eval()
    outputs = network(torch.randn(2, 3, size, size))
    assert outputs.logits.shape == (2, 10)
    assert outputs.embeddings is None


def test_embeddings_are_of_unit_norm():
    network = build_network(NetworkConfig(backbone="resnet20"), 10, Needs(projection=True), seed=0)
    outputs = network(torch.randn(6, 3, 16, 16))
    assert outputs.embeddings is not None
    assert outputs.embeddings.shape == (6, 128)
    assert torch.allclose(outputs.embeddings.norm(dim=1), torch.ones(6))
    images = torch.randn(3, 3, 16, 16)
    network.eval()
    assert torch.equal(network.classify(images), network(images).logits)


def test_seed_decides_the_weights_and_the_projection_changes_none():
    config = NetworkConfig(backbone="resnet20")
    with_, without = (build_network(config, 10, Needs(projection=p), seed=0).state_dict() for p in (True, False))
    assert all(torch.equal(with_[name], tensor) for name, tensor in without.items())
    other = build_network(config, 10, Needs(projection=False), seed=1).state_dict()
    assert not torch.equal(other["backbone.conv.weight"], without["backbone.conv.weight"])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_network(NetworkConfig(backbone="resnet20"), 10, Needs(projection=True), seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_cosine_head_is_the_scaled_cosine():
    head = Head(CosineHeadConfig(kind="cosine"), 4, 3)
    h = torch.randn(5, 4)
    expected = 16 * F.cosine_similarity(h[:, None], head.weight[None], dim=-1)
    assert torch.allclose(head(h), expected, atol=1e-5)
    assert torch.allclose(head(7 * h), expected, atol=1e-5)
    config = NetworkConfig(backbone="resnet20", head=CosineHeadConfig(kind="cosine", scale=ScaleConfig(start=8.0)))
    assert build_network(config, 3, Needs(projection=True), 0).classify(torch.randn(2, 3, 8, 8)).abs().max() <= 8
