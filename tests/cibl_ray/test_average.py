"""The average of the weights: what it is, that it survives a checkpoint, and that it is what a run is judged by."""

import numpy as np
import pytest
import torch

from cibl_ray.config import load_config
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.hardware import resolve
from cibl_ray.networks.average import WeightAverage
from cibl_ray.networks.config import Needs
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared

FLAGS = ["--epochs", "2", "--warmup_epochs", "0", "--loader.kind", "torch"]


def trainer(digits, folder, *more):
    folder.mkdir(exist_ok=True)
    return Trainer(resolve(load_config("quickstart", [*FLAGS, *more])), digits, folder)


def test_it_is_the_average_that_the_formula_says():
    config = load_config("quickstart", ["--head", "{kind: cosine}"]).network
    network = build_network(config, 4, Needs(projection=True), seed=0)
    average = WeightAverage(network, decay=0.4)
    expected = {name: tensor.double() for name, tensor in network.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.data.copy_(torch.rand(tensor.shape, generator=random))
        average.update(network, step)
        keep = min(0.4, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            copied = name.endswith(("log_scale", "num_batches_tracked"))
            expected[name] = tensor.double() if copied else keep * expected[name] + (1 - keep) * tensor.double()
    found = average.network.state_dict()
    assert keep == 0.4  # both ways of the minimum were taken
    assert all(torch.allclose(found[name].double(), tensor, atol=1e-6) for name, tensor in expected.items())
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def test_a_run_goes_on_to_the_bit_and_is_judged_by_the_average(digits, tmp_path):
    whole = trainer(digits, tmp_path / "whole", "--train.average", "0.9")
    result = whole.fit()
    half = trainer(digits, tmp_path / "half", "--train.average", "0.9")
    half.train_epoch()
    half.save()
    rest = trainer(digits, tmp_path / "half", "--train.average", "0.9")
    rest.restore(load_checkpoint(tmp_path / "half" / "checkpoints" / "last.safetensors"))
    rest.train_epoch()
    last = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    for mine, theirs in ((rest.network.state_dict(), last.weights), (rest.judged.state_dict(), last.average)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(last.weights[name], last.average[name]) for name in last.weights)
    # evaluate and export rebuild the network that was judged.
    rebuilt = last.network().state_dict()
    assert all(torch.equal(rebuilt[name], last.average[name]) for name in rebuilt)
    test = rest.evaluate("test")
    assert test is not None
    assert test.overall == result["last"]["scores"].overall
    best = load_checkpoint(tmp_path / "whole" / "checkpoints" / "best.safetensors")
    assert (best.optimizer, best.objective, best.average) == ({}, {}, {})


def test_a_run_without_one_may_begin_one(digits, tmp_path):
    first = trainer(digits, tmp_path)
    first.train_epoch()
    first.save()
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert saved.average == {}
    then = trainer(digits, tmp_path, "--train.average", "0.9")
    then.restore(saved)
    assert all(torch.equal(then.judged.state_dict()[name], tensor) for name, tensor in saved.weights.items())
    assert np.isfinite(list(then.train_epoch()["train"].values())).all()


@pytest.mark.parametrize("value", ["0", "1", "-0.5"])
def test_a_decay_that_is_none(value):
    with pytest.raises(UserError, match=r"train\.average"):
        load_config("quickstart", ["--train.average", value])


def test_evaluate_from_the_checkpoint(tmp_path):
    flags = ["--data.prepared", str(tmp_path / "prepared"), "--train.average", "0.95"]
    config = resolve(load_config("quickstart", [*FLAGS, *flags]))
    (tmp_path / "run").mkdir()
    run = Trainer(config, ensure_prepared(config.data, config.seed), tmp_path / "run")
    result = run.fit()
    again = evaluate(load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors"))
    assert again.scores.per_class == result["last"]["scores"].per_class
