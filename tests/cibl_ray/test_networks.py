"""Networks have the field's sizes, and start from the seed."""

import pytest
import torch
import torch.nn.functional as F

from cibl_ray.networks.config import Needs, NetworkConfig, ProjectionConfig
from cibl_ray.networks.heads.cosine import CosineHeadConfig, ScaleConfig
from cibl_ray.networks.modules import Head
from cibl_ray.networks.network import build_network
from pipelines.common.validation import validate


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


def test_the_width_of_a_cifar_network():
    """ResNet-32 with 64 base channels is another network of the field's tables, of 7.4 million parameters."""
    for width, expected in ((16, 464_154), (64, 7_386_186)):
        config = validate(NetworkConfig, {"backbone": {"kind": "resnet32", "width": width}}, "here")
        assert parameters(build_network(config, 10, Needs(), seed=0)) == expected
    assert config.model_dump(mode="json")["backbone"] == {"kind": "resnet32", "weights": "none", "width": 64}
    narrow = validate(NetworkConfig, {"backbone": "resnet32"}, "here")
    assert narrow.model_dump(mode="json")["backbone"] == "resnet32"


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


def test_projection_and_prototypes_may_have_batch_norm():
    """BCL's MLPs; without it the layers keep their names, so that earlier checkpoints open."""
    needs = Needs(projection=True, prototypes="projected")
    normed, plain = (
        build_network(NetworkConfig(backbone="resnet20", projection=ProjectionConfig(norm=norm)), 10, needs, seed=0)
        for norm in (True, False)
    )
    assert parameters(normed) == parameters(plain) + 2 * 2 * 512
    assert {"projection.layers.0.weight", "projection.layers.2.weight"} <= {*plain.state_dict()}
    for part in (normed.projection, normed.prototypes):
        hidden = part.layers[:2](10 * torch.randn(64, 64))
        assert torch.allclose(hidden.mean(0), torch.zeros(512), atol=1e-5)
        assert torch.allclose(hidden.var(0, unbiased=False), torch.ones(512), atol=1e-2)


def test_the_norm_of_a_cosine_heads_weights_at_the_start():
    def norms(**fields):
        config = NetworkConfig(backbone="resnet20", head=CosineHeadConfig(kind="cosine", **fields))
        return build_network(config, 50, Needs(projection=False), seed=0).head.weight.norm(dim=1)

    assert torch.allclose(norms(weight_norm=1), torch.ones(50))
    assert norms().mean().item() == pytest.approx(3**-0.5, abs=0.02)


def test_cosine_head_is_the_scaled_cosine():
    head = Head(CosineHeadConfig(kind="cosine"), 4, 3)
    h = torch.randn(5, 4)
    expected = 16 * F.cosine_similarity(h[:, None], head.weight[None], dim=-1)
    assert torch.allclose(head(h), expected, atol=1e-5)
    assert torch.allclose(head(7 * h), expected, atol=1e-5)
    config = NetworkConfig(backbone="resnet20", head=CosineHeadConfig(kind="cosine", scale=ScaleConfig(start=8.0)))
    assert build_network(config, 3, Needs(projection=True), 0).classify(torch.randn(2, 3, 8, 8)).abs().max() <= 8
