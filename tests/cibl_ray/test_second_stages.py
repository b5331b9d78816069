"""Second stages from a finished run: each against its plain twin, and everything that comes after a run."""

import copy
import dataclasses
import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

import cibl_ray.evaluate
import cibl_ray.train
from cibl_ray.bundle.card import open_bundle
from cibl_ray.bundle.runtime import Runtime
from cibl_ray.config import SAMConfig, load_config, save_config
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.exporting.make_bundle import Options, make_bundle
from cibl_ray.features.start import start_head
from cibl_ray.hardware import resolve
from cibl_ray.networks.config import Needs, NetworkConfig
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import load_checkpoint, save_checkpoint
from cibl_ray.training.passes import Passes, passes
from cibl_ray.training.tau import TAUS, tau_normalize
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared
from tests.commands import in_process
from tests.exported import small_run


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run of a linear head; its own configuration makes two views and contrasts."""
    return small_run(tmp_path_factory.mktemp("first"), "--loader.kind", "torch")


def second(first, *options):
    flags = ["--train.start", str(first), "--train.tune", "classifier", *options]
    return resolve(load_config(str(first / "config.yaml"), flags))


def trainer(config, folder):
    return Trainer(config, ensure_prepared(config.data, config.seed), folder)


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_classifier_retraining_is_that_of_the_paper(first, tmp_path):
    """MiSLAS: s_c·(w_c·h + b_c), label-aware smoothing, five times the rate for s, statistics of batch norm estimated again."""
    config = second(first)
    assert (config.data.sampling, len(config.data.views), config.train.epochs) == ("class_balanced", 1, 10)
    run = trainer(config, tmp_path)
    start = load_checkpoint(first / "checkpoints" / "best.safetensors")
    twin = start.network()
    for name, value in twin.state_dict().items():
        if name.startswith(("backbone.", "head.")):
            assert torch.equal(run.network.state_dict()[name], value)
    before, running = state(run.network), twin.train()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (twin.head.weight, twin.head.bias))
    scale = torch.ones(10, requires_grad=True)
    groups = [{"params": [weight, bias], "lr": 0.02}, {"params": [scale], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=2e-4)
    counts = start.train_counts
    share = np.sin((counts - counts.min()) / (counts.max() - counts.min()) * math.pi / 2)
    epsilon = torch.from_numpy(0.1 + 0.3 * share)
    run.network.train()
    for number, images in zip(range(3), run.feeds[0].steps(0, 0), strict=False):
        run._schedule(number / run.train_loaders[0].batches)
        for group, rate in zip(optimizer.param_groups, (0.02, 0.1), strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / run.train_loaders[0].batches / 10))
        with torch.no_grad():
            h = running.backbone(images.pixels)
        log_p = (scale * (h @ weight.T + bias)).log_softmax(1)
        smooth = epsilon[images.labels]
        own = log_p[torch.arange(len(h)), images.labels]
        loss = (-(1 - smooth) * own - smooth / 9 * (log_p.sum(1) - own)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(run.optimize([images])["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    head = run.network.head
    assert torch.allclose(head.weight, weight, atol=1e-6)
    assert torch.allclose(head.bias, bias, atol=1e-6)
    assert torch.allclose(head.class_scale, scale, atol=1e-6)
    assert (scale - 1).abs().max() > 1e-3
    of_twin = running.backbone.state_dict()
    for name, value in run.network.backbone.state_dict().items():
        if "running_" in name:
            assert torch.allclose(value, of_twin[name], atol=1e-5), name
            assert not torch.equal(value, before[f"backbone.{name}"])
        elif "num_batches" not in name:
            assert torch.equal(value, before[f"backbone.{name}"]), name
    run.epoch, run.step = 1, 0
    assert run.passes == Passes(0, run.train_loaders[0].batches * 64)
    sam = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"sam": SAMConfig(start=0.5)})})
    assert passes(sam, batches=7) == Passes(0, 7 * 64 * 15)  # ten epochs, five of them twice


def test_statistics_may_stay_as_they_are(first, tmp_path):
    run = trainer(second(first, "--batch_norm", "keep", "--epochs", "1"), tmp_path)
    before = state(run.network.backbone)
    run.train_epoch()
    assert all(torch.equal(value, before[name]) for name, value in run.network.backbone.state_dict().items())


def test_weights_stay_within_the_cap_of_weight_balancing(first, tmp_path):
    """MaxNorm by projected gradient descent: SGD's step, then w_c·min(1, δ/‖w_c‖)."""
    config = second(first, "--head.max_norm", "0.1")
    assert config.network.head.class_scale is None
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.loss.kind) == (0.01, 0.1, "cross_entropy")
    run = trainer(config, tmp_path)
    twin = load_checkpoint(first / "checkpoints" / "best.safetensors").network()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (twin.head.weight, twin.head.bias))
    norms = np.linalg.norm(weight.detach().numpy(), axis=1)
    cap = norms.min() + 0.1 * (norms.max() - norms.min())
    optimizer = torch.optim.SGD([weight, bias], 0.01, momentum=0.9, weight_decay=0.1)
    twin.train()
    run.network.train()
    run._schedule(0)
    for _, images in zip(range(3), run.feeds[0].steps(0, 0), strict=False):
        with torch.no_grad():
            h = twin.backbone(images.pixels)
        loss = F.cross_entropy(h @ weight.T + bias, images.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for row in weight:
                row *= min(1.0, cap / float(row.norm()))
        run.optimize([images])
    assert torch.allclose(run.network.head.weight, weight, atol=1e-6)
    assert torch.allclose(run.network.head.bias, bias, atol=1e-6)
    assert float(run.network.head.weight.detach().norm(dim=1).max()) <= cap * (1 + 1e-6)
    # The cap is that of the start, whatever the weights are when a run is resumed.
    run.save()
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert float(checkpoint.network().head.norm_cap) == pytest.approx(cap)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_tau_normalisation_divides_by_a_power_of_the_norms(tau):
    network = build_network(NetworkConfig(backbone="resnet20"), 5, Needs(), seed=3)
    h = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = network.head.weight.detach().clone(), network.head.bias.detach().clone()
    weight *= torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2])[:, None]
    network.head.weight.data.copy_(weight)
    tau_normalize(network.head, tau)
    plain = h @ (weight / weight.norm(dim=1, keepdim=True) ** tau).T
    logits = network.head(h)
    if tau == 0:
        assert torch.allclose(logits, plain + bias, atol=1e-6)
    else:  # as in the paper but for one factor of all, and no bias
        factors = logits / plain
        assert torch.allclose(factors, factors[0, 0].expand_as(factors), rtol=1e-3)
    if tau == 1:
        assert torch.allclose(network.head.weight.norm(dim=1), network.head.weight[0].norm().expand(5), rtol=1e-5)


def test_tau_is_chosen_on_validation_images_and_the_run_is_one_like_any_other(first, tmp_path):
    biased = tmp_path / "biased"  # a head whose norms favour the common classes: τ-normalisation takes that back
    shutil.copytree(first, biased)
    source = load_checkpoint(first / "checkpoints" / "best.safetensors")
    head = trainer(second(first, "--train.head_start", "class_means"), tmp_path / "means").network.head
    weight, bias = head.weight.detach() * torch.logspace(1, 0, len(head.weight))[:, None], torch.zeros(len(head.weight))
    weights = dict(source.weights) | {"head.weight": weight, "head.bias": bias}
    save_checkpoint(biased / "checkpoints" / "best.safetensors", dataclasses.replace(source, weights=weights))
    first = biased
    done = in_process(
        cibl_ray.train.main, first / "config.yaml", "--train.start", first, "--train.tune", "classifier",
        "--train.head_start", "tau_normalized", "--runs", tmp_path, "--name", "tau",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tau"
    tau = yaml.safe_load((run / "config.yaml").read_text())["train"]["tau"]
    result = json.loads((run / "result.json").read_text())
    assert (result["last"]["epoch"], result["passes"]) == (0, {"trained": 0, "forward": 0})
    checkpoint = load_checkpoint(run / "checkpoints" / "last.safetensors")
    found = evaluate(checkpoint, split="val").scores.balanced
    # Every τ by itself, with a network of its own.
    balanced = {}
    for each in TAUS:
        source = copy.copy(load_checkpoint(first / "checkpoints" / "best.safetensors"))
        network = source.network()
        tau_normalize(network.head, each)
        object.__setattr__(source, "weights", network.state_dict() | {
            name: value for name, value in source.weights.items() if name not in network.state_dict()
        })  # fmt: skip
        balanced[each] = evaluate(source, split="val").scores.balanced
    assert found == pytest.approx(balanced[tau], abs=1e-6)
    assert tau > 0
    assert balanced[tau] == max(balanced.values())
    again = in_process(cibl_ray.evaluate.main, run)
    assert f"{100 * result['last']['scores']['overall']:.1f}" in again.stdout
    resumed = in_process(cibl_ray.train.main, "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "result.json").read_text())["last"]["scores"] == result["last"]["scores"]


def test_tau_normalisation_sees_the_factors_of_the_classes():
    """They multiply the logits, so the norms are those of their products with the weights."""
    network = build_network(NetworkConfig(backbone="resnet20", head={"kind": "linear", "class_scale": 5.0}), 5, Needs(), seed=3)
    h = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5])
    network.head.class_scale.data.copy_(scale)
    before, weight = network.head(h).detach(), network.head.weight.detach().clone() * scale[:, None]
    tau_normalize(network.head, 0)
    assert torch.equal(network.head(h), before)
    tau_normalize(network.head, 1)
    factors = network.head(h).detach() / (h @ F.normalize(weight).T)
    assert torch.allclose(factors, factors[0, 0].expand_as(factors), rtol=1e-3)


def test_a_second_stage_may_start_from_a_second_stage(first, tmp_path):
    save_config(second(first, "--epochs", "3", "--head.max_norm", "0.1"), tmp_path / "config.yaml")
    own = load_config(str(tmp_path / "config.yaml"), [])
    assert (own.train.epochs, own.optimizer.weight_decay, own.network.head.max_norm) == (3, 0.1, 0.1)
    longer = load_config(str(tmp_path / "config.yaml"), ["--epochs", "4"])  # its settings stay
    assert (longer.train.epochs, longer.optimizer.weight_decay) == (4, 0.1)
    mislas = second(tmp_path)
    assert (mislas.train.epochs, mislas.loss.kind, mislas.optimizer.lr) == (10, "label_smoothing", 0.02)
    assert mislas.network.head.max_norm is None
    tau = second(tmp_path, "--train.head_start", "tau_normalized")
    assert (tau.train.epochs, tau.loss.kind) == (0, "cross_entropy")
    capped = second(tmp_path, "--head.max_norm", "0.2", "--epochs", "2")
    assert (capped.train.epochs, capped.network.head.max_norm, capped.optimizer.lr) == (2, 0.2, 0.01)


def test_the_rate_of_the_log_is_that_of_the_configuration(first, tmp_path):
    """Not that of the classes' factors, which is five times as high."""
    run = trainer(second(first, "--epochs", "1"), tmp_path)
    batches = run.train_loaders[0].batches
    expected = 0.02 * 0.5 * (1 + math.cos(math.pi * (batches - 1) / batches))
    assert run.train_epoch()["rate"]["lr"] == pytest.approx(expected)


def test_a_given_tau_and_class_means(first, tmp_path):
    options = ["--train.head_start", "tau_normalized", "--train.tau", "0.6"]
    run = trainer(second(first, *options), tmp_path)
    twin = load_checkpoint(first / "checkpoints" / "best.safetensors").network()
    tau_normalize(twin.head, 0.6)
    assert torch.equal(run.network.head.weight, twin.head.weight)
    assert run.config.train.tau == 0.6
    capped = trainer(second(first, *options, "--network.head.max_norm", "0.1"), tmp_path / "capped")
    norms = twin.head.weight.norm(dim=1)
    assert torch.allclose(capped.network.head.norm_cap, norms.min() + 0.1 * (norms.max() - norms.min()))
    means = trainer(second(first, "--train.head_start", "class_means"), tmp_path / "means")
    prepared = means.prepared
    assert torch.equal(means.network.backbone.conv.weight, twin.backbone.conv.weight)
    labels = torch.from_numpy(prepared.beton("train").labels.astype(np.int64))
    features = means._feature_loaders().features("train")[:, 0]
    start_head(twin, "class_means", features, labels, 0)
    assert torch.allclose(means.network.head.weight, twin.head.weight, atol=1e-6)


def test_a_scale_that_moved_stays_where_it_ended(tmp_path):
    scale = "{start: 8, end: 32, shape: linear, warmup: 20}"
    save_config(load_config("quickstart", ["--network.head", f"{{kind: cosine, scale: {scale}}}"]), tmp_path / "config.yaml")
    found = second(tmp_path).network.head.scale
    assert (found.start, found.end, found.warmup) == (32, None, 0)
    assert second(tmp_path, "--network.head.scale.start", "16").network.head.scale.start == 16


def test_folds_of_the_first_stage_are_none_of_the_second(tmp_path):
    save_config(load_config("photos", ["--data.source.path", str(tmp_path), "--folds", "5"]), tmp_path / "config.yaml")
    for tune in ("classifier", "partial", "full"):
        flags = ["--train.tune", tune, *(["--train.start", str(tmp_path)] if tune == "classifier" else [])]
        assert load_config(str(tmp_path / "config.yaml"), flags).train.folds in (0, "auto")


def test_a_cap_of_the_norms_is_none_of_the_next_stage(first, tmp_path):
    capped = trainer(second(first, "--head.max_norm", "0.1", "--epochs", "1"), tmp_path / "capped")
    capped.save()
    start = tmp_path / "capped" / "checkpoints" / "last.safetensors"
    flags = ["--train.start", str(start), "--train.tune", "classifier", "--epochs", "1"]
    again = trainer(resolve(load_config(str(first / "config.yaml"), flags)), tmp_path / "again")
    assert torch.equal(again.network.head.weight, capped.network.head.weight)


def test_a_second_stage_resumes_to_the_bit_without_the_first(first, tmp_path):
    config = second(first, "--epochs", "2")
    whole = trainer(config, tmp_path / "whole")
    whole.train_epoch()
    whole.save()
    whole.train_epoch()
    start = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    train = config.train.model_copy(update={"start": tmp_path / "gone"})
    rest = Trainer(config.model_copy(update={"train": train}), whole.prepared, tmp_path / "rest", resume_from=start)
    rest.restore(start)
    rest.train_epoch()
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.network.state_dict().items())


def test_a_second_stage_is_exported_and_says_where_it_began(first, tmp_path):
    done = in_process(
        cibl_ray.train.main, first / "config.yaml", "--train.start", first, "--train.tune", "classifier", "--epochs", "1",
        "--runs", tmp_path, "--name", "retrained",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "retrained"
    checkpoint = run / "checkpoints" / "last.safetensors"
    options = Options(precisions=("fp32", "int8"), calibration=50, max_drop=100, provider="cpu")
    made = make_bundle(checkpoint, tmp_path / "bundle", options)
    assert (made.folder / "README.md").read_text().count("Second stage: the classifier, from the run `digits`") == 1
    assert open_bundle(made.folder).manifest["source"]["start"] == "digits"
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    (logits,) = Runtime(made.folder / "model.onnx", "cpu")(images, outputs=("logits",))
    network = load_checkpoint(checkpoint).network().eval()
    from pipelines.augment.recipe import Normalize

    pixels = Normalize(load_checkpoint(checkpoint).config.data)(torch.from_numpy(images)[:, None])
    with torch.no_grad():
        assert np.allclose(logits, network.classify(pixels).numpy(), atol=1e-4)


def test_any_depth_may_start_from_a_run(first, tmp_path):
    flags = ["--train.start", str(first), "--loss", "{kind: cross_entropy}"]
    config = resolve(load_config(str(first / "config.yaml"), [*flags, "--train.head_start", "random"]))
    run = trainer(config, tmp_path)
    start = load_checkpoint(first / "checkpoints" / "best.safetensors").network()
    assert torch.equal(run.network.backbone.conv.weight, start.backbone.conv.weight)
    assert not torch.equal(run.network.head.weight, start.head.weight)
    features = resolve(load_config(str(first / "config.yaml"), [*flags, "--train.tune", "head"]))
    of_features = trainer(features, tmp_path / "features")
    assert torch.equal(of_features.network.head.weight, start.head.weight)
    assert of_features.features is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss.kind", "cibl"], "train.tune 'classifier' trains the head alone, and loss 'cibl' contrasts"),
        (["--network.head.kind", "cosine", "--train.head_start", "tau_normalized"], "those of a cosine head play no part"),
        (["--train.tau", "5"], "train.tau"),
    ],
)
def test_what_a_second_stage_cannot_do(first, options, said):
    with pytest.raises(UserError, match=said):
        second(first, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "0"], "train.epochs is 0, so nothing is trained"),
        (["--train.tune", "classifier"], "name a finished run by train.start"),
        (["--train.head_start", "tau_normalized"], "needs a trained head: name a finished run by train.start"),
    ],
)
def test_without_a_run_to_start_from(options, said):
    with pytest.raises(UserError, match=said):
        load_config("quickstart", options)


def test_a_run_that_cannot_be_the_start(first, tmp_path, digits, caplog):
    def made(*options, data=None):
        config = second(first, *options)
        return Trainer(config, data or ensure_prepared(config.data, config.seed), tmp_path)

    with pytest.raises(UserError, match="train.start: .*nowhere.* does not exist; name a run folder or a checkpoint file"):
        made("--train.start", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is of another network, resnet20 with a linear head: .* begin with the configuration"):
        made("--backbone", "resnet32")
    with pytest.raises(UserError, match="is of another network, resnet20 with a linear head"):
        made("--network.head", "{kind: cosine}")
    fewer = [*digits.classes[:9], "another"]
    with pytest.raises(UserError, match="tells 10 classes apart that are not the 10 of these data"):
        made(data=copy.replace(digits, classes=fewer) if hasattr(copy, "replace") else _with_classes(digits, fewer))
    no_val = ["--val_fraction", "0", "--train.head_start", "tau_normalized"]
    with pytest.raises(UserError, match="train.tau 'auto' chooses on validation images, and the data have none"):
        made(*no_val)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made("--seed", "5")
    assert "what is held out here may have been trained on there" in caplog.text


def _with_classes(prepared, classes):
    other = copy.copy(prepared)
    object.__setattr__(other, "classes", classes)
    return other
