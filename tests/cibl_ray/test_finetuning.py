"""What is frozen stays as it was, and learning rates fall towards the input."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cibl_ray.config import OptimizerConfig, load_config
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.config import LastBlocks, Needs, NetworkConfig, Norms
from cibl_ray.networks.depth import blocks, depth_of
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.training.batch_norm import SyncedBatchNorm, sync_batch_norm
from cibl_ray.training.cached import CachedPasses
from cibl_ray.training.mix import mix, paste
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.passes import passes
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import UserError


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


@pytest.mark.parametrize("tune", ["partial", "full"])
def test_pretrained_batch_norm_computes_with_the_statistics_that_it_came_with(digits, tmp_path, tune):
    flags = ["--tune", tune, "--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--precision", "fp32"]
    flags += ["--optimizer.kind", "adamw", "--optimizer.lr", "0.01", "--loss", "{kind: cross_entropy}"]
    file = tmp_path / "resnet20.safetensors"
    save_file({name: value.contiguous() for name, value in small().backbone.state_dict().items()}, file)
    pretrained = ["--network.backbone", f"{{kind: resnet20, weights: {file}}}"]
    for more, moves in ((pretrained, False), ([*pretrained, "--batch_norm", "update"], True), ([], True)):
        run = Trainer(resolve(load_config("quickstart", [*flags, *more])), digits, tmp_path)
        before = {name: value.clone() for name, value in run.network.backbone.state_dict().items()}
        images = next(run.feeds[0].steps(0, 0))
        run.network.train()
        if not moves:  # nothing of the network differs between training and evaluation
            in_training = run.network(images.pixels).logits
            assert torch.equal(in_training, run.network.eval()(images.pixels).logits)
        run.train_epoch()
        changed = {name for name, value in run.network.backbone.state_dict().items() if not torch.equal(value, before[name])}
        assert {"blocks.8.conv2.weight", "blocks.8.bn2.weight"} <= changed
        assert any("running_" in name for name in changed) == moves


@pytest.mark.parametrize("tune", ["head", "classifier", "partial"])
def test_a_frozen_backbone_may_have_parameters_of_its_own(tune):
    """Such as a ViT's class token."""
    network = build_network(NetworkConfig(backbone={"kind": "timm", "name": "vit_tiny_patch16_224"}), 5, Needs(), seed=0)
    network.freeze(tune, LastBlocks(count=1))
    assert not network.train().backbone.training
    assert network.head.training


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize(("tune", "trained"), [("full", {True}), ("partial", {False, True}), ("classifier", {False})])
def test_stochastic_depth_is_of_trained_blocks_alone(name, tune, trained):
    """It has no parameters of its own. A ViT's frozen class token lies in the module around all blocks."""
    backbone = {"kind": "timm", "name": name, "drop_path": 0.5}
    network = build_network(NetworkConfig(backbone=backbone), 5, Needs(), seed=0)
    network.freeze(tune, LastBlocks(count=2))
    network.train()
    found = set()
    for name, module in network.backbone.named_modules():
        if type(module).__name__ == "DropPath":
            block = network.backbone.get_submodule(name.rpartition(".")[0])
            found.add(any(parameter.requires_grad for parameter in block.parameters()))
            assert module.training == any(parameter.requires_grad for parameter in block.parameters()), name
    assert found == trained
    network.eval()
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(("tune", "partial"), [("partial", LastBlocks(count=1)), ("partial", Norms(kind="norms"))])
def test_what_is_frozen_stays_so_where_workers_share_their_statistics(tune, partial):
    network = build_network(NetworkConfig(backbone="resnet20"), 5, Needs(), seed=0)
    network.freeze(tune, partial)
    still = {
        name for name, module in network.train().named_modules() if isinstance(module, nn.BatchNorm2d) and not module.training
    }
    assert still
    sync_batch_norm(network, SimpleNamespace(size=2))
    synced = {name for name, module in network.train().named_modules() if isinstance(module, SyncedBatchNorm)}
    assert still <= synced
    assert still == {name for name in synced if not network.get_submodule(name).training}


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


def test_micro_batches_add_up_to_the_step_of_the_batch(digits, tmp_path):
    flags = ["--tune", "head", "--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--precision", "fp32"]
    flags += ["--batch_size", "32", "--loss", "{kind: balanced_softmax}", "--network.neck", "{hidden: 16}"]
    found = []
    for parts in ("1", "4"):
        run = Trainer(resolve(load_config("quickstart", [*flags, "--accumulate", parts])), digits, tmp_path)
        row = run.train_epoch()
        found.append((row["train"], run.network.state_dict()))
    for name, value in found[0][0].items():
        assert found[1][0][name] == pytest.approx(value, rel=1e-5)
    assert all(torch.allclose(value, found[1][1][name], atol=1e-6) for name, value in found[0][1].items())
    with pytest.raises(UserError, match="batch_size 32 cannot be split evenly into train.accumulate = 5 parts"):
        Trainer(resolve(load_config("quickstart", [*flags, "--accumulate", "5"])), digits, tmp_path)


def test_the_contrastive_set_of_micro_batches_is_their_own(digits, tmp_path):
    flags = ["--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--batch_size", "32", "--accumulate", "4"]
    run = Trainer(resolve(load_config("quickstart", [*flags, "--loss", "{kind: cibl}"])), digits, tmp_path)
    sizes = []
    contrast = run.objective._contrast
    run.objective._contrast = lambda z, labels, keys: sizes.append(len(z)) or contrast(z, labels, keys)
    run.optimize([next(run.feeds[0].steps(0, 0))])
    assert sizes == [8 * len(run.config.data.views)] * 4


@pytest.mark.parametrize("loss", ["{kind: cibl, queue: 256}", "{kind: hybrid_sc}"])
def test_the_contrastive_set_may_be_all_micro_batches(digits, tmp_path, loss):
    """As one large batch, where batch norm keeps its statistics."""
    flags = ["--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--batch_size", "32", "--precision", "fp32"]
    flags += ["--loss", loss, "--batch_norm", "keep", "--contrast_set", "step"]
    found = []
    for parts in ("1", "4"):
        run = Trainer(resolve(load_config("quickstart", [*flags, "--accumulate", parts])), digits, tmp_path)
        run.network.train()
        terms = run.optimize([next(feed.steps(0, 0)) for feed in run.feeds])
        gradient = torch.cat([parameter.grad.flatten() for parameter in run.network.parameters()])
        found.append((terms, gradient, run.objective.queue and run.objective.queue.embeddings[:64].clone()))
        cost = passes(run.config, 10)
        assert cost.forward == (cost.trained if parts == "4" else 0)
    (terms, gradient, queue), (of_parts, cached, their_queue) = found
    assert terms.keys() == of_parts.keys()
    assert all(float(of_parts[name]) == pytest.approx(float(value), rel=1e-6) for name, value in terms.items())
    assert (cached - gradient).norm() <= 1e-5 * gradient.norm()
    assert queue is None or torch.allclose(queue, their_queue, atol=1e-6)


def test_workers_draw_different_dropout(digits, tmp_path):
    trainer = Trainer(resolve(load_config("quickstart", ["--loader.kind", "torch", "--epochs", "1"])), digits, tmp_path)
    draws = []
    for rank in (0, 1, 0):
        trainer.world = SimpleNamespace(rank=rank)
        trainer._seed(0)
        draws.append(torch.rand(8))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_dropout_drops_the_same_when_micro_batches_run_again():
    network = build_network(NetworkConfig(backbone="resnet20", neck={"hidden": 16, "dropout": 0.5}), 4, Needs(), seed=0)
    network.freeze("full", LastBlocks(), keep_statistics=True)
    network.train()
    pixels, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    found = []
    for again in (False, True):
        network.zero_grad()
        torch.manual_seed(0)
        cached = CachedPasses(lambda network, pixels: network(pixels), 4, [8])
        logits = cached(network, pixels).logits if again else torch.cat([network(part).logits for part in pixels.chunk(4)])
        nn.functional.cross_entropy(logits, labels).backward()
        if again:
            cached.backward(contextlib.nullcontext())
        found.append((torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]), torch.rand(1)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert torch.equal(found[0][1], found[1][1])  # what is drawn next


def test_activations_that_are_computed_again_give_the_same_gradient(digits, tmp_path):
    flags = ["--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch", "--batch_size", "4", "--precision", "fp32"]
    timm = ["--network.backbone", "{kind: timm, name: test_efficientnet, weights: none}", "--loss", "{kind: cross_entropy}"]
    gradients = []
    for again in ("false", "true"):
        run = Trainer(resolve(load_config("quickstart", [*flags, *timm, "--checkpoint_activations", again])), digits, tmp_path)
        run.network.train()
        run.optimize([next(run.feeds[0].steps(0, 0))])
        gradients.append([p.grad for p in run.network.parameters()])
        assert run.network.backbone.grad_checkpointing == (again == "true")
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))
    with pytest.raises(UserError, match="'resnet20' cannot; timm's models can"):
        Trainer(
            resolve(load_config("quickstart", [*flags, "--backbone", "resnet20", "--checkpoint_activations", "true"])),
            digits,
            tmp_path,
        )


def test_mixup_and_cutmix_mix_images_and_labels_by_the_same_share():
    draw = np.random.default_rng(3)
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).repeat_interleave(2, 0)  # two views of each sample
    images = Images(pixels, torch.tensor([5, 6, 7, 8]), 2)
    for mixup, cutmix in ((0.4, 0.0), (0.0, 1.0)):
        for _ in range(5):
            mixed = mix(images, mixup, cutmix, draw)
            others, share = mixed.mixed
            assert others.tolist() == [8, 7, 6, 5]
            assert 0 <= share <= 1
            own, other = pixels.mean((1, 2, 3)), pixels.flip(0).mean((1, 2, 3))
            assert torch.allclose(mixed.pixels.mean((1, 2, 3)), share * own + (1 - share) * other, atol=1e-5)
            assert (mixup > 0) == (mixed.pixels[0].unique().numel() == 1)
    assert torch.equal(images.pixels, pixels)


def test_the_loss_of_mixed_images_is_that_of_soft_labels(digits, tmp_path):
    flags = ["--tune", "head", "--epochs", "1", "--loader.kind", "torch", "--precision", "fp32", "--warmup_epochs", "0"]
    flags += ["--mixup", "0.5", "--batch_size", "8"]
    run = Trainer(resolve(load_config("quickstart", [*flags, "--loss", "{kind: cross_entropy}"])), digits, tmp_path)
    images = next(run.feeds[0].steps(0, 0))
    (mixed,) = run._step._mixed([images], 0, 0, 0)
    others, share = mixed.mixed
    logits = run.network.classify(mixed.pixels)
    one_hot = torch.nn.functional.one_hot(images.labels, 10) * share + torch.nn.functional.one_hot(others, 10) * (1 - share)
    expected = torch.nn.functional.cross_entropy(logits, one_hot.repeat_interleave(images.views, 0))
    assert run.optimize([images])["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match="the contrastive loss 'cibl' needs whole ones"):
        load_config("quickstart", [*flags, "--loss", "{kind: cibl}"])
    with pytest.raises(UserError, match="train.cutmix and train.cmo cut images"):
        load_config("quickstart", [*flags, "--cutmix", "1", "--loss", "{kind: cross_entropy}"])


def adapted(tmp_path, digits, *more, name="adapted"):
    flags = ["--tune", "partial", "--epochs", "2", "--warmup_epochs", "0", "--loader.kind", "torch", "--precision", "fp32"]
    flags += ["--train.partial", "{kind: adapters, rank: 4}", "--optimizer", "{kind: adamw, lr: 0.01}", "--batch_size", "32"]
    flags += ["--loss", "{kind: cross_entropy}", "--average", "0.9", *more]
    (tmp_path / name).mkdir(exist_ok=True)
    return Trainer(resolve(load_config("quickstart", flags)), digits, tmp_path / name)


def test_adapters_are_trained_and_merged_into_the_weights_that_they_adapt(digits, tmp_path):
    pytest.importorskip("peft")
    timm = ["--network.backbone", "{kind: timm, name: test_efficientnet, weights: none}"]
    run = adapted(tmp_path, digits, *timm)
    plain = build_network(run.config.network, len(digits.classes), Needs(), run.config.seed)
    images = next(run.feeds[0].steps(0, 0)).pixels
    # Adapters change nothing before they are trained: the network is the pretrained one.
    assert torch.allclose(run.network.eval()(images).logits, plain.eval()(images).logits, atol=1e-6)
    names = {name.removesuffix(".lora_A.default.weight") for name in run.network.state_dict() if "lora_A" in name}
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    assert names == {name for name, layer in layers.items() if layer.groups == 1 and type(layer) is nn.Conv2d}
    assert len(names) < len(layers)  # depthwise convolutions have none
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    for _ in range(2):
        run.train_epoch()
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name.startswith("backbone.")} == {
        name for name in before if "lora_" in name
    }  # neither weights nor running statistics of the backbone
    assert {"head.weight", "head.bias"} <= changed
    run.save()
    merged = load_checkpoint(tmp_path / "adapted" / "checkpoints" / "last.safetensors").network().eval()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        expected, started = run.judged.eval()(images).logits, plain.eval()(images).logits
        assert torch.allclose(merged(images).logits, expected, atol=1e-4)
    assert not torch.allclose(expected, started, atol=1e-2)


def test_a_run_of_adapters_resumes_to_the_bit(digits, tmp_path):
    pytest.importorskip("peft")
    more = ["--backbone", "resnet20", "--head_start", "trained"]
    whole = adapted(tmp_path, digits, *more, name="whole")
    head = whole.network.head.weight.clone()
    whole.train_epoch()
    whole.save()
    whole.train_epoch()
    start = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    rest = Trainer(whole.config, digits, tmp_path / "rest", resume_from=start)
    rest.restore(start)
    assert not torch.equal(rest.network.head.weight, head)
    rest.train_epoch()
    for own, theirs in ((rest.network, whole.network), (rest.judged, whole.judged)):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())


def test_without_peft_its_package_is_named(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the package peft; install it: pip install 'cibl-ray\\[adapters\\]'"):
        adapted(tmp_path, digits, "--backbone", "resnet20")


def test_cmo_pastes_rectangles_of_the_other_stream_and_labels_by_area():
    draw = np.random.default_rng(3)
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).repeat_interleave(2, 0)
    images, sources = Images(pixels, torch.tensor([5, 6, 7, 8]), 2), Images(pixels + 10, torch.tensor([1, 2, 3, 4]), 2)
    shares = []
    for _ in range(200):
        mixed = paste(images, sources, draw)
        others, share = mixed.mixed
        assert others.tolist() == [1, 2, 3, 4]
        assert mixed.labels.tolist() == [5, 6, 7, 8]
        assert mixed.pixels.mean((1, 2, 3)).tolist() == pytest.approx(
            [row + 10 * (1 - share) for row in (0, 0, 1, 1, 2, 2, 3, 3)], abs=1e-4
        )
        shares.append(share)
    assert 0.5 < np.mean(shares) < 0.75  # uniform, and then clipped by the border


def test_all_workers_paste_in_the_same_steps(digits, tmp_path):
    """They gather the labels of mixed images together; each draws rectangles of its own."""
    flags = ["--epochs", "8", "--loader.kind", "torch", "--batch_size", "32", "--loss.kind", "balanced_softmax"]
    run = Trainer(resolve(load_config("quickstart", [*flags, "--train.cmo", "{chance: 0.5}"])), digits, tmp_path)
    streams = [next(feed.steps(4, 0)) for feed in run.feeds]
    of_workers = []
    for first_row in (0, 16):
        run._step._first_row = first_row
        of_workers.append([run._step._mixed(streams, 4, step, 0)[0].mixed for step in range(24)])
    chosen, others = ([mixed is not None for mixed in each] for each in of_workers)
    assert chosen == others
    assert 4 < sum(chosen) < 20
    assert [mixed[1] for mixed in of_workers[0] if mixed] != [mixed[1] for mixed in of_workers[1] if mixed]


@pytest.mark.parametrize("more", [[], ["--train.accumulate", "2", "--train.contrast_set", "step"]])
def test_cmo_draws_its_sources_class_balanced_and_keeps_the_first_and_last_epochs_plain(digits, tmp_path, monkeypatch, more):
    flags = [*more, "--epochs", "4", "--warmup_epochs", "0", "--loader.kind", "torch", "--batch_size", "32"]
    flags += ["--backbone", "resnet20"]
    flags += ["--loss", "{kind: balanced_softmax}", "--train.cmo", "{chance: 1, first_epochs: 1, last_epochs: 2}"]
    run = Trainer(resolve(load_config("quickstart", flags)), digits, tmp_path)
    seen = []
    call = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda *given: seen.append(given[3]) or call(*given))
    sampled = torch.zeros(10)
    for epoch in range(4):
        for own, other in zip(run.feeds[0].steps(epoch, 0), run.feeds[1].steps(epoch, 0), strict=True):
            sampled += torch.bincount(other.labels, minlength=10)
            if run.epoch == epoch and len(seen) > epoch:
                continue  # one step of an epoch is enough
            run.epoch = epoch
            run.optimize([own, other])
            assert len(seen[-1]) == 1  # the loss sees one stream
            assert (seen[-1][0].mixed is not None) == (epoch == 1)
            if epoch == 1:
                assert torch.equal(seen[-1][0].mixed[0], other.labels)
    shares = sampled / sampled.sum()
    assert shares.min() > 0.06  # of ten classes, the smallest with a hundredth of the images
    with pytest.raises(UserError, match="cutmix and cmo mix labels"):
        load_config("quickstart", ["--loss", "{kind: cibl}", "--train.cmo", "{}"])
    with pytest.raises(UserError, match=r"train\.cmo does not go with train\.mixup"):
        load_config("quickstart", ["--loss", "{kind: cross_entropy}", "--train.cmo", "{}", "--train.mixup", "1"])


@pytest.mark.parametrize("loader", ["torch", "resident"])
def test_views_from_begins_as_one_view_and_goes_on_with_all(digits, tmp_path, loader):
    """Its first epochs are those of a run of the first view alone, the others those of a run of every view."""
    flags = ["--epochs", "3", "--warmup_epochs", "0", "--loader.kind", loader, "--batch_size", "32", "--backbone", "resnet20"]
    flags += ["--precision", "fp32", "--loss", "{kind: cibl, queue: 64}"]
    config = resolve(load_config("quickstart", [*flags, "--train.views_from", "0.6"]))
    every = config.model_copy(update={"train": config.train.model_copy(update={"views_from": 0.0})})
    one = every.model_copy(update={"data": config.data.model_copy(update={"views": config.data.views[:1]})})
    mixed, plain, single = (Trainer(each, digits, tmp_path) for each in (config, every, one))
    for epoch, twin in ((0, single), (1, single), (2, plain)):
        steps = [next(run.feeds[0].steps(epoch, 0)) for run in (mixed, twin)]
        assert [images.views for images in steps] == [1 if twin is single else 2] * 2
        assert torch.equal(steps[0].pixels, steps[1].pixels)
        assert torch.equal(steps[0].labels, steps[1].labels)
    assert mixed.train_epoch()["train"] == single.train_epoch()["train"]
    assert all(map(torch.equal, mixed.network.state_dict().values(), single.network.state_dict().values()))
    mixed.train_epoch()
    mixed.train_epoch()
    assert mixed.passes.trained == (1 + 1 + 2) * 32 * mixed.feeds[0].loader.batches


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--loss.kind", "proco"), "begins with one view, and loss 'proco' as configured needs more"),
        (("--loss", "{kind: cibl, momentum: 0.9}"), "loss 'cibl' as configured needs more; set it to 0"),
        (("--loss", "{kind: bcl, contrast_views: others}"), "loss 'bcl' as configured needs more"),
        (("--loss", "{kind: hybrid_sc, classifier_views: [1]}"), "loss 'hybrid_sc' as configured needs more"),
        (("--train.tune", "head"), "train.views_from is for images"),
    ],
)
def test_views_from_is_refused_where_one_view_is_too_few(more, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [*more, "--train.views_from", "0.5"])


def test_a_step_with_sam_is_the_gradient_at_the_peak(digits, tmp_path):
    """Against the definition: w - lr·∇L(w + ρ·g/|g|), running statistics those of the first pass alone."""
    flags = ["--epochs", "2", "--warmup_epochs", "0", "--loader.kind", "torch", "--batch_size", "32", "--backbone", "resnet20"]
    flags += ["--precision", "fp32", "--optimizer", "{lr: 0.1, momentum: 0, nesterov: false, weight_decay: 0}"]
    plain = resolve(load_config("quickstart", flags))
    sam = resolve(load_config("quickstart", [*flags, "--optimizer.sam", "{rho: 0.3, from: 0.5}"]))
    assert (sam.optimizer.sam.rho, sam.optimizer.sam.start) == (0.3, 0.5)
    runs = [Trainer(config, digits, tmp_path) for config in (plain, sam, sam)]
    images = next(runs[0].feeds[0].steps(0, 0))
    runs[2].epoch = 1
    for run in runs:
        run.network.train()
        before = {name: value.clone() for name, value in run.network.named_parameters()}
        run.optimize([images])
    after = [{name: value.detach() for name, value in run.network.named_parameters()} for run in runs]
    assert all(torch.equal(after[0][name], after[1][name]) for name in before)  # before its start
    gradients = {name: (before[name] - after[0][name]) / 0.1 for name in before}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    peak = Trainer(plain, digits, tmp_path)
    peak.network.train()
    with torch.no_grad():
        for name, value in peak.network.named_parameters():
            value.copy_(before[name] + 0.3 * gradients[name] / norm)
    peak.epoch = 1
    peak.optimize([images])
    for name, value in peak.network.named_parameters():
        expected = before[name] - (before[name] + 0.3 * gradients[name] / norm - value.detach())
        assert torch.allclose(after[2][name], expected, atol=2e-5), name
    for name, value in runs[0].network.named_buffers():
        assert "running" not in name or torch.equal(value, runs[2].network.get_buffer(name))
    images_seen = 10 * 32 * 2 * len(plain.data.views)
    assert passes(plain, 10).trained == images_seen
    assert passes(sam, 10).trained == 1.5 * images_seen
    assert passes(sam, 10, 1).trained == images_seen / 2
    paco = [load_config("quickstart", ["--loss.kind", "paco", "--optimizer.sam", text]) for text in ("null", "{from: 0}")]
    once, twice = (passes(each, 10) for each in paco)
    assert (twice.trained, twice.forward) == (2 * once.trained, 2 * once.forward)
