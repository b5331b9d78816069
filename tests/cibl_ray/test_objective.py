"""From images to terms: streams, views, momentum encoder and queue; every loss trains, and resumes to the bit."""

import itertools
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cibl_ray.config import RunConfig, load_config, save_config
from cibl_ray.config_warnings import config_warnings
from cibl_ray.hardware import resolve
from cibl_ray.losses.bcl import BCLConfig, balanced_contrastive
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from cibl_ray.run.stop import Stop
from cibl_ray.training.feed import read_plans
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.loaders.reading import Share
from pipelines.prepare.build import ensure_prepared
from tests.conftest import digits_config

LOSSES = {
    "cross_entropy": "{kind: cross_entropy}",
    "balanced_softmax": "{kind: balanced_softmax}",
    "ldam": "{kind: ldam, reweight_from: 0.5}",
    "supcon": "{kind: supcon}",
    "psc": "{kind: psc}",
    "hybrid_sc": "{kind: hybrid_sc}",
    "hybrid_psc": "{kind: hybrid_psc, curve: linear, classifier_views: [1, 0]}",
    "bcl": "{kind: bcl}",
    "paco": "{kind: paco, queue: 100}",
    "proco": "{kind: proco}",
    "cibl": "{kind: cibl}",
    "cibl_with_everything": "{kind: cibl, queue: 90, momentum: 0.9, kappa: 1, classify: first, normalize: true}",
    "cibl_by_class": "{kind: cibl, normalize: class, classify: first}",
    "cibl_with_a_queue": "{kind: cibl, queue: 200, classify: first}",
}


def train_step(trainer, batches, step):
    """Train on one batch of each stream, as step number `step` of the epoch. Returns the terms of the loss."""
    pairs = zip(batches, trainer.feeds, strict=True)
    return trainer.optimize([feed.ready([batch], trainer.epoch, step)[0] for batch, feed in pairs])


def config_of(loss: str, *more: str) -> RunConfig:
    flags = ["--loss", LOSSES[loss], "--epochs", "2", "--warmup_epochs", "0", "--loader.kind", "torch"]
    head = ["--head", "{kind: cosine}"] if loss == "ldam" else []
    return resolve(load_config("quickstart", [*flags, *head, *more]))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_goes_on_to_the_bit(loss, digits, tmp_path):
    """Two epochs at a stretch, or one, a checkpoint, and another: the same weights, queue and averaged network."""
    config = config_of(loss)
    whole = Trainer(config, digits, tmp_path / "whole")
    rows = [whole.train_epoch(), whole.train_epoch()]
    assert all(np.isfinite(list(row["train"].values())).all() for row in rows)
    assert {"loss", "accuracy"} <= set(rows[0]["train"])
    first = Trainer(config, digits, tmp_path / "half")
    first.train_epoch()
    first.save()
    second = Trainer(config, digits, tmp_path / "half")
    second.restore(load_checkpoint(tmp_path / "half" / "checkpoints" / "last.safetensors"))
    second.train_epoch()
    assert_same(second, whole)


def assert_same(second: Trainer, whole: Trainer) -> None:
    for mine, theirs in (
        (second.network.state_dict(), whole.network.state_dict()),
        (second.objective.state(), whole.objective.state()),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class _StopsAfter(Stop):
    """Asks to stop when it has been looked at so many times: within an epoch of one process, after so many steps."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def asked(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        *[(loss, ()) for loss in ("cibl_with_everything", "cibl_with_a_queue", "paco", "proco", "hybrid_psc", "ldam")],
        ("cibl", ("--network.neck", "{hidden: 32, dropout: 0.5}")),
        ("cibl_with_a_queue", ("--optimizer.sam", "{rho: 0.1, from: 0}")),
    ],
)
def test_an_epoch_goes_on_to_the_bit(loss, more, digits, tmp_path):
    """Queue, averaged network, streams and dropout are where they were in the middle of the second epoch."""
    config = config_of(loss, "--batch_size", "64", *more)
    whole = Trainer(config, digits, tmp_path / "whole")
    whole.train_epoch()
    whole.train_epoch()
    first = Trainer(config, digits, tmp_path / "half")
    assert first.train_loaders[0].batches >= 4
    first.train_epoch()
    first.pauses.stop = _StopsAfter(2)
    with pytest.raises(KeyboardInterrupt):
        first.train_epoch()
    assert (first.epoch, first.step) == (1, 2)
    second = Trainer(config, digits, tmp_path / "half")
    second.restore(load_checkpoint(tmp_path / "half" / "checkpoints" / "last.safetensors"))
    second.train_epoch()
    assert_same(second, whole)


def test_a_run_stopped_in_validation_validates_when_it_is_resumed(digits, tmp_path):
    """The end is that of a run left alone: weights, scores, the best epoch, and the log."""
    config = config_of("cross_entropy", "--batch_size", "64", "--train.eval_batch_size", "4")
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = Trainer(config, digits, tmp_path / "whole")
    expected = whole.fit()
    stopped = Trainer(config, digits, tmp_path / "stopped")
    steps = stopped.train_loaders[0].batches
    stopped.pauses.stop = _StopsAfter(steps + 1)  # it looks after each step but the last, and before each batch of validation
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert (stopped.epoch, stopped.step) == (1, 0)
    assert [row["epoch"] for row in read_metrics(tmp_path / "stopped") if "val" not in row] == [1]
    again = Trainer(config, digits, tmp_path / "stopped")
    again.restore(load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.safetensors"))
    assert again.fit() == expected
    assert_same(again, whole)
    rows = [
        [(row["epoch"], row["train"], row["val"]) for row in read_metrics(tmp_path / name)] for name in ("whole", "stopped")
    ]
    assert rows[0] == rows[1]


def test_a_run_whose_epochs_have_one_step_stops(tmp_path):
    """It looks between its epochs, where it has no validation split either. Resumed, it is the run left alone."""
    config = config_of("cross_entropy", "--batch_size", "256", "--epochs", "4", "--train.checkpoint_every", "4")
    without = ensure_prepared(digits_config(tmp_path).model_copy(update={"val_fraction": 0.0}), seed=0)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = Trainer(config, without, tmp_path / "whole")
    assert whole.train_loaders[0].batches == 1
    expected = whole.fit()
    stopped = Trainer(config, without, tmp_path / "stopped")
    stopped.pauses.stop = _StopsAfter(2)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert (stopped.epoch, stopped.step) == (2, 0)
    assert [row["epoch"] for row in read_metrics(tmp_path / "stopped")] == [1, 2]
    again = Trainer(config, without, tmp_path / "stopped")
    again.restore(load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.safetensors"))
    assert again.fit() == expected
    assert_same(again, whole)


@pytest.mark.parametrize("loss", ["cibl_with_a_queue", "cibl_with_everything", "proco"])
def test_the_second_pass_of_sam_sees_what_the_first_saw(loss, digits, tmp_path, monkeypatch):
    """The queue has no image of the step in either pass, and takes each in once; so do the average and the class means."""
    found = {}
    for name, more in (("plain", ()), ("sam", ("--optimizer.sam", "{rho: 1e-9, from: 0}"))):
        trainer = Trainer(config_of(loss, "--batch_size", "32", *more), digits, tmp_path)
        terms, call = [], Objective.__call__
        with monkeypatch.context() as patch:
            patch.setattr(Objective, "__call__", lambda *given, to=terms, call=call: to.append(call(*given)) or to[-1])
            for step, batch in enumerate(itertools.islice(trainer.train_loaders[0].epoch(0), 2)):
                train_step(trainer, [batch], step)
        found[name] = [of["loss"].item() for of in terms], trainer.objective.snapshot()
    once, twice = found["plain"], found["sam"]
    assert twice[0] == pytest.approx([once[0][0], once[0][0], once[0][1], once[0][1]], rel=1e-4)
    for name, tensor in once[1].items():
        if "num_batches_tracked" in name:  # counts, and decides nothing
            continue
        assert torch.allclose(tensor.double(), twice[1][name].double(), atol=1e-4), name


def test_a_head_is_trained_with_an_averaged_network(tmp_path, digits):
    flags = ("--train.tune", "head", "--train.feature_views", "2", "--network.neck", "{hidden: 16}", "--batch_size", "64")
    trainer = Trainer(config_of("paco", *flags), digits, tmp_path)
    assert trainer.objective.averaged is not None
    row = trainer.train_epoch()
    assert np.isfinite(row["train"]["loss"])


def test_a_batch_norm_with_one_value_is_told(digits, tmp_path):
    flags = ("--network.projection.norm", "true", "--data.views", "[{}]", "--batch_size", "4", "--train.accumulate", "4")
    config = config_of("bcl", *flags, "--data.prepared", str(tmp_path))
    trainer = Trainer(config, ensure_prepared(config.data, 0), tmp_path)
    with pytest.raises(UserError, match="has one value a channel to normalise by; raise train.batch_size"):
        trainer.train_epoch()


def test_a_tail_skew_of_0_trains_as_cross_entropy_does(digits, tmp_path):
    """To the bit, over an epoch: the contrastive term has no weight, and its projection no gradient that others would see."""
    skewed = Trainer(config_of("cibl", "--loss.tail_skew", "0"), digits, tmp_path)
    plain = Trainer(config_of("cross_entropy"), digits, tmp_path)
    skewed.train_epoch()
    plain.train_epoch()
    there, here = plain.network.state_dict(), skewed.network.state_dict()
    assert set(there) < set(here)
    assert all(torch.equal(here[name], value) for name, value in there.items())


class WaitsForTheDevice(TorchDispatchMode):
    """Fails at what makes the host wait for a GPU, since the result's shape or a Python number depends on values there."""

    names = ("nonzero", "_local_scalar_dense", "bincount", "_unique2", "masked_select", "repeat_interleave", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(at is not None and at.dtype == torch.bool for at in args[1])
        assert name not in self.names, name
        assert not by_mask, "an index by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_device(loss, digits, tmp_path):
    trainer = Trainer(config_of(loss), digits, tmp_path)
    batches = [next(iter(loader.epoch(0))) for loader in trainer.train_loaders]
    with WaitsForTheDevice():
        trainer._schedule(0.5)
        train_step(trainer, batches, 0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), WaitsForTheDevice():
        trainer.network.head.weight.sum().item()


class CountsWaits(WaitsForTheDevice):
    """Counts what the other refuses."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") in self.names
        return func(*args, **(kwargs or {}))


def waits_of(steps: int, digits, folder, per_step=lambda: None) -> int:
    """How often an epoch of so many steps waits, several of them augmented at once; its batches lie in the device's memory."""
    augmented = ("--data.views", "[{augment: [{kind: color_jitter}]}, {augment: [{kind: cutout, size: 2}]}]")
    trainer = Trainer(config_of("cibl", "--batch_size", "16", "--train.average", "0.9", *augmented), digits, folder)
    loader, feed = trainer.train_loaders[0], trainer.feeds[0]
    batches = [*itertools.islice(loader.epoch(0), steps)]
    loader.epoch, loader.batches, feed.at_once = lambda epoch, start=0: iter(batches), steps, 4
    optimize = trainer.optimize

    def and_more(streams):
        per_step()
        return optimize(streams)

    trainer.optimize = and_more
    with CountsWaits() as mode:
        trainer.train_epoch()
    return mode.count


def test_a_longer_epoch_waits_no_more_often(digits, tmp_path):
    assert waits_of(9, digits, tmp_path) == waits_of(3, digits, tmp_path)
    number = torch.ones(())
    assert waits_of(4, digits, tmp_path, number.item) == waits_of(3, digits, tmp_path, number.item) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_longer_epoch_waits_no_more_often_for_a_gpu(digits, tmp_path):
    counts = []
    for largest in ("40", "120"):
        flags = ("--loader.kind", "resident", "--device", "cuda", "--batch_size", "16", "--data.profile.largest", largest)
        config = config_of("cibl", *flags, "--prepared", str(tmp_path))
        trainer = Trainer(config, ensure_prepared(config.data, config.seed), tmp_path)
        assert trainer.train_loaders[0].batches < 50  # then it looks whether the loss is finite
        trainer.train_epoch()
        with warnings.catch_warnings(action="always", record=True) as found:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train_epoch()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(len(found))
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_no_epoch_waits_for_a_gpu(loss, digits, tmp_path):
    second = "{cut: {kind: resized}, augment: [{kind: color_jitter}]}"
    views = ("--data.views", f"[{{cut: {{kind: crop, padding: 2}}}}, {second}]")
    config = config_of(loss, "--loader.kind", "resident", "--device", "cuda", "--train.average", "0.9", *views)
    trainer = Trainer(config, digits, tmp_path)
    trainer.train_epoch()
    streams = zip(*(loader.epoch(1) for loader in trainer.train_loaders), strict=True)
    try:
        for step, batches in enumerate(streams):
            with warnings.catch_warnings(action="ignore"):  # that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first copies the epoch's order
            trainer._schedule(1.5)
            train_step(trainer, batches, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_like_eager(device, digits, tmp_path, loss="cibl_with_everything", precision="fp32"):
    """Two networks and two shapes: some steps, with and without torch.compile, end with about the same weights."""
    weights = []
    for compiled in ("true", "false"):
        flags = ["--precision", precision, "--device", device, "--lr", "0.01", "--train.compile", compiled]
        trainer = Trainer(config_of(loss, *flags), digits, tmp_path)
        streams = zip(*(loader.epoch(0) for loader in trainer.train_loaders), strict=True)
        for step, batches in enumerate(itertools.islice(streams, 3)):
            assert train_step(trainer, batches, step)["loss"].isfinite()
        assert trainer.objective.queue is None or trainer.objective.queue.written > 0
        weights.append(trainer.network.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        tolerance = 1e-3 if precision == "fp32" else 2e-2
        assert torch.allclose(weights[0][name], weights[1][name], rtol=tolerance, atol=tolerance), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_alike(digits, tmp_path):
    compiled_like_eager("cpu", digits, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["cibl_with_everything", "paco", "hybrid_sc"])
def test_compiled_networks_train_alike_on_a_gpu(loss, precision, digits, tmp_path):
    compiled_like_eager("cuda", digits, tmp_path, loss, precision)


def test_a_compiler_that_is_missing_is_told(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # nothing compiled before helps
    trainer = Trainer(config_of("cross_entropy", "--train.compile", "true"), digits, tmp_path)
    streams = zip(*(loader.epoch(0) for loader in trainer.train_loaders), strict=True)
    with pytest.raises(UserError, match=r"cannot be compiled here \(.*C\+\+ compiler.*; set train.compile: false"):
        train_step(trainer, next(streams), 0)


@pytest.mark.parametrize("loss", ["cibl", "hybrid_sc", "paco"])
def test_training_lowers_the_loss(loss, digits, tmp_path):
    trainer = Trainer(config_of(loss, "--epochs", "8"), digits, tmp_path)
    before = {name: parameter.clone() for name, parameter in trainer.network.named_parameters()}
    rows = [trainer.train_epoch() for _ in range(4)]
    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]
    still = [name for name, parameter in trainer.network.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_hybrid_reads_two_streams_from_one_file(tmp_path):
    config = load_config("quickstart", ["--loss", "{kind: hybrid_sc, classifier_views: [1]}", "--prepared", str(tmp_path)])
    contrastive, classifier = read_plans(config.loss, config.data, 32, seed=0, share=Share())
    assert (contrastive.sampling, classifier.sampling) == ("instance", "class_balanced")
    assert (len(contrastive.views), classifier.views) == (2, (config.data.views[1],))
    assert contrastive.seed != classifier.seed
    trainer = Trainer(resolve(config), ensure_prepared(config.data, 0), tmp_path)
    assert len(list(tmp_path.glob("*/train*.beton"))) == 1
    labels = [torch.cat([batch.labels.clone() for batch in loader.epoch(0)]) for loader in trainer.train_loaders]
    many, few = (of.bincount(minlength=10) for of in labels)
    assert many.max() > 5 * many.min()
    assert few.max() - few.min() < 0.5 * few.float().mean()


def images_of(samples=6, views=2, size=16):
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 2, 0])[:samples]
    return Images(torch.randn(samples * views, 3, size, size, generator=random), labels, views)


def objective_of(loss: str, *more: str):
    config = config_of(loss, *more)
    network = build_network(config.network, 10, config.loss.needs, seed=0)
    return Objective(config.loss, network, np.arange(10, 0, -1), torch.device("cpu"), World(), 6), network


def run(network, pixels):
    return network(pixels)


def test_hybrid_classifies_the_second_stream_alone():
    """At the run's end the contrastive share is nothing: the loss is the cross-entropy of the classifier's images."""
    objective, network = objective_of("hybrid_sc")
    second = Images(torch.randn(6, 3, 16, 16), torch.tensor([9, 8, 7, 6, 5, 4]), 1)
    terms = objective(network, run, [images_of(), second], progress=1.0)
    assert terms["contrastive_share"] == 0
    assert torch.equal(terms["loss"], terms["cross_entropy"])
    logits = network(torch.cat((images_of().pixels, second.pixels))).logits[12:]
    expected = torch.nn.functional.cross_entropy(logits, second.labels)
    assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)
    start = objective(network, run, [images_of(), second], progress=0.0)
    assert torch.equal(start["loss"], start["contrastive"])


def test_supcon_alone_teaches_the_classifier_beside_it():
    objective, network = objective_of("supcon")
    terms = objective(network, run, [images_of()], progress=0.0)
    gradient = torch.autograd.grad(terms["loss"], [network.head.weight, network.backbone.conv.weight], retain_graph=True)
    assert all(part.abs().sum() > 0 for part in gradient)
    classified = torch.nn.functional.cross_entropy(network(images_of().pixels).logits, images_of().labels.repeat_interleave(2))
    assert torch.autograd.grad(classified, network.backbone.conv.weight, allow_unused=True) == (None,)


def test_the_averaged_network_embeds_the_other_views_and_feeds_the_queue():
    objective, network = objective_of("cibl_with_everything")
    assert objective.averaged is not None
    assert objective.queue is not None
    seen = []

    def watch(module, pixels):
        seen.append((module is network, pixels.clone()))
        return module(pixels)

    images = images_of()
    objective(network, watch, [images], progress=0.0)["loss"].backward()
    assert [live for live, _ in seen] == [False, True]
    assert torch.equal(seen[0][1], images.pixels[1::2])
    assert torch.equal(seen[1][1], images.pixels[0::2])
    assert objective.queue.content()[1].tolist() == images.labels.tolist()
    assert all(parameter.grad is None for parameter in objective.averaged.parameters())
    with torch.no_grad():
        network.head.weight.add_(1.0)
    before = objective.averaged.head.weight.clone()
    objective.begin_step()
    for _ in range(2):  # the parts of a step
        objective(network, run, [images], progress=0.0)
    expected = 0.9 * before + 0.1 * network.head.weight
    assert torch.allclose(objective.averaged.head.weight, expected, atol=1e-6)


def test_an_average_that_an_earlier_version_saved_is_taken_over():
    objective, _ = objective_of("cibl_with_everything")
    other, _ = objective_of("cibl_with_everything")
    with torch.no_grad():
        objective.averaged.head.weight.add_(1.0)
    named = {name.replace("averaged.", "averaged.module."): tensor for name, tensor in objective.state().items()}
    other.load(named | {"averaged.n_averaged": torch.tensor(5)})
    assert torch.equal(other.averaged.head.weight, objective.averaged.head.weight)


def test_a_queue_partly_filled_counts_what_it_has():
    """The second step's positives: the batch's own, and the first step's embeddings of the class."""
    objective, network = objective_of("cibl_with_a_queue")
    first = objective(network, run, [images_of()], progress=0.0)
    second = objective(network, run, [images_of()], progress=0.0)
    positives = torch.tensor([5.0, 5, 3, 3, 1, 5])  # two views; classes of 3, 2 and 1 samples
    weight = 1 / (1 + 0.05 * positives)
    assert first["cross_entropy_weight"].item() == pytest.approx(weight.mean().item(), rel=1e-5)
    weight = 1 / (1 + 0.05 * (positives + torch.tensor([6.0, 6, 4, 4, 2, 6])))
    assert second["cross_entropy_weight"].item() == pytest.approx(weight.mean().item(), rel=1e-5)


def test_deferred_reweighting_begins_at_its_share():
    objective, network = objective_of("ldam")
    network.eval()
    early, late = (objective(network, run, [images_of()], progress=p)["loss"].item() for p in (0.49, 0.5))
    assert early != late


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "{kind: ldam}"], "set network.head.kind: cosine"),
        (["--loss", "{kind: hybrid_sc, classifier_views: [2]}"], "names view 2; data.views are 0 to 1"),
        (
            ["--loss", "{kind: hybrid_sc, share: 0.2}"],
            "share 0.2 would do nothing: the curve is parabolic; set curve: constant",
        ),
        (["--loss", "{kind: paco}", "--data.views", "[{cut: {kind: crop}}]"], "data.views has one"),
        (["--head", "{kind: cosine, scale: {end: 30}}"], "a shape of linear or cosine needs an `end`"),
        (["--head", "{kind: cosine, scale: {end: 30, shape: linear, learnable: true}}"], "a learned scale follows no shape"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", flags)


@pytest.mark.parametrize("loss", ["{kind: hybrid_psc}", "{kind: hybrid_sc, curve: constant, share: 0.2}"])
def test_what_a_run_has_saved_is_read_again(loss, tmp_path):
    config = load_config("quickstart", ["--loss", loss])
    save_config(config, tmp_path / "config.yaml")
    assert "share" in (tmp_path / "config.yaml").read_text()
    assert load_config(str(tmp_path / "config.yaml"), []) == config


@pytest.mark.parametrize("kind", ["supcon", "psc", "hybrid_sc", "hybrid_psc", "bcl", "paco", "cibl"])
def test_a_temperature_too_low_to_divide_by_is_refused(kind):
    with pytest.raises(UserError, match=r"loss\.temperature = 1e-10: .*greater than or equal to 0\.001"):
        load_config("quickstart", ["--loss.kind", kind, "--loss.temperature", "1e-10"])


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("cross_entropy", "balanced_softmax", "ldam")])
def test_the_least_temperature_gives_finite_terms_and_gradients(loss):
    objective, network = objective_of(loss, "--loss.temperature", "1e-3")
    streams = [images_of()] + ([images_of()] if loss.startswith("hybrid") else [])
    terms = objective(network, run, streams, progress=0.5)
    terms["loss"].backward()
    assert all(torch.isfinite(term).all() for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("epochs", "reweight_from", "most"),
    [(1, 0.8, "0"), (3, 0.8, "0.66"), (4, 0.8, "0.75"), (5, 0.8, None), (3, 0.66, None), (1, 0, None), (3, 1, None)],
)
def test_a_reweighting_that_never_begins_is_told(epochs, reweight_from, most):
    loss = f"{{kind: ldam, reweight_from: {reweight_from}}}"
    flags = ["--head", "{kind: cosine, scale: {start: 30}}", "--loss", loss, "--epochs", str(epochs), "--warmup_epochs", "0"]
    told = config_warnings(load_config("quickstart", flags))
    assert len(told) == (most is not None)
    assert all(f"after the last of {epochs} epochs begins" in line and f"set it to {most} at most" in line for line in told)


def test_nothing_is_told_of_a_second_stage_without_epochs(tmp_path):
    flags = ["--loss.kind", "ldam", "--head", "{kind: cosine, scale: {start: 30}}", "--epochs", "0", "--warmup_epochs", "0"]
    assert config_warnings(load_config("quickstart", [*flags, "--train.start", str(tmp_path)])) == []


_FROZEN = ("--train.tune", "head", "--train.start", "runs/first")  # features that are trained
_HEAD = (*_FROZEN, "--loss.kind", "cross_entropy")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), None),
        (("--data.views", "[{}]"), "data.views has one view"),
        (("--data.views", "[{}]", "--loss.queue", "64"), None),
        (("--data.views", "[{}]", "--loss.kind", "bcl"), None),
        (("--data.views", "[{}]", "--loss.kind", "supcon"), "data.views has one view"),
        (("--data.views", "[{}]", "--loss.kind", "cross_entropy"), None),
        (("--loss", "{kind: bcl, cross_entropy_weight: 0, contrastive_weight: 0}"), "are both 0"),
        (("--loss", "{kind: bcl, cross_entropy_weight: 0}"), None),
        (("--loss.kind", "ldam", "--head.kind", "cosine"), "the paper's is 30"),
        (("--loss.kind", "ldam", "--head", "{kind: cosine, scale: {start: 30}}"), None),
        (("--schedule", "{kind: steps, milestones: [0.9, 0.8]}"), "taken as [0.8, 0.9]"),
        (
            ("--schedule", "{kind: steps, warmup_epochs: 5, milestones: [0.1, 0.9]}"),
            "0.1 of 30 epochs is within the warm-up of 5",
        ),
        (("--schedule", "{kind: steps, warmup_epochs: 5, milestones: [0.2, 0.9]}"), None),
        ((*_FROZEN, "--network.neck", "{hidden: 16}"), "train.feature_views is 0"),
        ((*_FROZEN, "--network.neck", "{hidden: 16}", "--train.feature_views", "2"), None),
        (
            (*_FROZEN, "--network.neck", "{hidden: 16}", "--train.feature_views", "4", "--data.views", "[{}]"),
            "data.views has one view",
        ),
        ((*_FROZEN, "--train.feature_views", "2"), "set network.neck"),
        (("--loss.kind", "balanced_softmax", "--data.sampling", "class_balanced"), "data.sampling 'class_balanced' balances"),
        (("--loss.kind", "bcl", "--data.sampling", "class_balanced"), "data.sampling 'class_balanced' balances"),
        (("--loss.kind", "bcl", "--data.sampling", "square_root"), None),  # half of it
        (("--loss.kind", "cross_entropy", "--data.sampling", "class_balanced"), None),
        (
            (
                "--loss",
                "{kind: hybrid_sc, kappa: 1}",
            ),
            "loss.classifier_sampling 'class_balanced' balances",
        ),
        (("--loss", "{kind: hybrid_sc}", "--data.sampling", "class_balanced"), None),
        (("--loss.kind", "cross_entropy", "--train.cmo", "{}", "--epochs", "7"), "nothing is pasted"),
        (("--loss.kind", "cross_entropy", "--train.cmo", "{}", "--epochs", "8"), None),
        (("--loss.kind", "cross_entropy", "--train.mixup", "1", "--train.accumulate", "64"), "lower train.accumulate"),
        (("--train.batch_norm", "keep"), "set auto"),
        (("--data.store.raw_share", "0.3"), "data.store.raw_share 0.3 is for mode 'mixed'"),
        (("--data.store", "{mode: mixed, raw_share: 0.3}"), None),
        (("--data.profile", "{kind: exp, imbalance: 10, subset: field}"), "not those of the published tables"),
        (("--data.profile", "{kind: exp, imbalance: 10, subset: field}", "--data.val_fraction", "0"), None),
        (("--train.tau", "0.5"), "train.tau is for train.head_start 'tau_normalized' and does nothing here"),
        (("--train.contrast_set", "step"), "is for train.accumulate > 1"),
        (("--train.contrast_set", "step", "--train.accumulate", "2"), None),
        (("--train.feature_views", "2"), "is for train.tune 'head'"),
        (("--train.partial", "{kind: norms}"), "is for train.tune 'partial'"),
        (("--train.partial", "{kind: norms}", "--train.tune", "partial"), None),
        (("--optimizer", "{kind: adamw, momentum: 0.5}"), "optimizer.momentum 0.5 is for optimizer.kind 'sgd'"),
        (("--optimizer.betas", "[0.8, 0.9]"), "optimizer.betas [0.8, 0.9] is for optimizer.kind 'adamw'"),
        (("--optimizer", "{kind: adamw, betas: [0.8, 0.9]}"), None),
        ((*_HEAD, "--optimizer.layer_decay", "0.75"), "is for train.tune 'partial' or 'full'"),
        ((*_HEAD, "--train.batch_norm", "update"), "is for a train.tune other than 'head'"),
        ((*_HEAD, "--train.checkpoint_activations", "true"), "is for a train.tune other than 'head'"),
        (
            ("--loss.kind", "cross_entropy", "--train.contrast_set", "step", "--train.accumulate", "2"),
            "train.contrast_set 'step' is for a loss with a contrast",
        ),
        (("--train.views_from", "0.97"), "leaves every epoch with the first view alone"),
        (("--train.views_from", "0.96"), None),
        (("--network.head", "{kind: linear, max_norm: 0.1}"), "it is for a second stage"),
        (("--train.tune", "head", "--loss.kind", "cross_entropy"), "--network.backbone '{kind: resnet18, weights: default}'"),
        (
            (
                *("--train.tune", "head", "--loss.kind", "cross_entropy", "--data.size", "224"),
                *("--network.backbone", "{kind: resnet18, weights: default}"),
            ),
            None,
        ),
    ],
)
def test_what_is_probably_a_mistake_is_told(flags, told):
    found = config_warnings(load_config("quickstart", ["--epochs", "30", *flags]))
    assert len(found) == (told is not None), found
    assert all(told in line for line in found)


def test_proco_needs_another_view_and_wide_embeddings():
    with pytest.raises(UserError, match="'proco' contrasts every view but the first"):
        load_config("quickstart", ["--data.views", "[{}]", "--loss", "{kind: proco}"])
    with pytest.raises(UserError, match=r"projection\.size is 8; loss 'proco' needs 16"):
        load_config("quickstart", ["--network.projection.size", "8", "--loss", "{kind: proco}"])


def test_a_contrast_of_the_other_views_needs_another_view():
    with pytest.raises(UserError, match="leaves out the first view"):
        load_config("quickstart", ["--data.views", "[{}]", "--loss", "{kind: bcl, contrast_views: others}"])


@pytest.mark.parametrize("workers", [False, True])
def test_bcl_may_contrast_all_views_but_the_first(workers):
    """The same as the loss of the other views alone; of a worker whose anchors stand in the middle, too."""
    random = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(18, 8, generator=random, dtype=torch.float64), dim=1)
    prototypes = F.normalize(torch.randn(4, 8, generator=random, dtype=torch.float64), dim=1)
    logits, labels = torch.randn(18, 4, generator=random, dtype=torch.float64), torch.arange(6).repeat_interleave(3) % 4
    prior = ClassPrior.of(torch.tensor([5, 3, 2, 1]), torch.float64)
    others = torch.arange(18) % 3 > 0
    own = slice(6, 15) if workers else slice(0, 18)
    contrast = ContrastSet(z, labels, own.start)
    inputs = LossInputs(
        logits[own], labels[own], labels, views=3, embeddings=z[own] if workers else z, contrast=contrast, prototypes=prototypes
    )
    ours = BCLConfig(kind="bcl", contrast_views="others", classify="first").terms(inputs, prior, 0.0)
    start = 4 if workers else 0
    alone = ContrastSet(z[others], labels[others], start)
    anchors = z[others][start : start + 6] if workers else alone.embeddings
    own_labels = labels[others][start : start + 6] if workers else labels[others]
    expected = balanced_contrastive(anchors, own_labels, alone, prototypes, 0.1).mean()
    assert torch.allclose(ours["contrastive"], expected, rtol=1e-12)


def test_a_scheduled_scale_moves_and_is_saved(digits, tmp_path):
    config = config_of("cibl", "--head", "{kind: cosine, scale: {start: 8, end: 32, shape: linear}}")
    trainer = Trainer(config, digits, tmp_path)
    trainer.train_epoch()
    steps = trainer.train_loaders[0].batches
    assert trainer.network.head.scale.item() == pytest.approx(8 + 24 * (steps - 1) / (2 * steps), rel=1e-5)
    trainer.save()
    rebuilt = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors").network()
    assert torch.equal(rebuilt.head.scale, trainer.network.head.scale)


def test_a_learned_scale_moves_by_its_gradient_alone(digits, tmp_path):
    config = config_of("cibl", "--head", "{kind: cosine, scale: {start: 8, learnable: true}}")
    trainer = Trainer(config, digits, tmp_path)
    trainer.train_epoch()
    assert trainer.network.head.scale.item() != pytest.approx(8, abs=1e-3)
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is trainer.network.head.log_scale for p in g["params"])]
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 1


def test_recipes_reach_the_network_and_go_on_to_the_bit(digits, tmp_path):
    """Each view's recipe changes what is trained on; an epoch in two sittings of the trainer draws the same."""
    cut = "cut: {kind: crop, padding: 2}"
    views = f"[{{{cut}, augment: [{{kind: auto_augment}}, {{kind: cutout, size: 6}}]}}, {{{cut}}}]"
    plain = Trainer(config_of("hybrid_sc"), digits, tmp_path)
    plain.train_epoch()
    whole, half = (Trainer(config_of("hybrid_sc", "--data.views", views), digits, tmp_path / name) for name in ("a", "b"))
    whole.train_epoch()
    whole.train_epoch()
    half.train_epoch()
    half.save()
    resumed = Trainer(half.config, digits, tmp_path / "b")
    resumed.restore(load_checkpoint(tmp_path / "b" / "checkpoints" / "last.safetensors"))
    resumed.train_epoch()
    weights = [trainer.network.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(
        plain.network.state_dict()["backbone.conv.weight"], half.network.state_dict()["backbone.conv.weight"]
    )


def test_several_steps_augmented_at_once_train_the_same_network(digits, tmp_path):
    """As on a GPU that holds the images: the draws, and so the weights, are those of a step at a time; from any step on."""
    cut = "cut: {kind: crop, padding: 2}"
    views = f"[{{{cut}, augment: [{{kind: auto_augment}}, {{kind: cutout, size: 6}}]}}, {{{cut}, augment: [{{kind: blur}}]}}]"
    config = config_of("hybrid_sc", "--data.views", views, "--loader.kind", "resident")
    single, several = (Trainer(config, digits, tmp_path) for _ in range(2))
    assert all(loader.lasting for loader in several.train_loaders)
    assert all(feed.at_once == 1 for feed in several.feeds)  # on a CPU nothing is launched
    for feed in several.feeds:
        feed.at_once = 4
    assert several.train_loaders[0].batches % 4
    for trainer in (single, several):
        trainer.step = 1
        trainer.train_epoch()
        trainer.train_epoch()
    weights = [trainer.network.state_dict() for trainer in (single, several)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [("cibl", "cibl_with_a_queue"), ("cibl_with_a_queue", "cibl_with_everything"), ("paco", "cibl"), ("cibl", "paco")],
)
def test_another_queue_or_average_is_refused(before, after):
    with pytest.raises(UserError, match="is not that of loss"):
        objective_of(after)[0].load(objective_of(before)[0].state())
