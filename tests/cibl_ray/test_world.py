"""Several workers compute what one would: every loss, every gradient, every evaluated sample."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from cibl_ray import world as world_module
from cibl_ray.config import OptimizerConfig, build_config
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.config import Adapters, LastBlocks, Norms
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from cibl_ray.training.batch_norm import SyncedBatchNorm, average_statistics, sync_batch_norm
from cibl_ray.training.cached import CachedPasses
from cibl_ray.training.exchange import GradientExchange
from cibl_ray.training.optimizer import make_optimizer
from cibl_ray.training.sharpness import at_the_peak
from cibl_ray.world import PeerLostError, World
from pipelines.common.config_file import find_config, read_config
from pipelines.common.errors import UserError
from pipelines.loaders.reading import Share
from tests.conftest import REPOSITORY

BATCH, CLASSES, STEPS = 7, 5, 3
LOSSES = {
    "cross_entropy": "{kind: cross_entropy}",
    "balanced_softmax": "{kind: balanced_softmax}",
    "ldam": "{kind: ldam, reweight_from: 0}",
    "ldam_of_mixed_images": "{kind: ldam, reweight_from: 0}",
    "supcon": "{kind: supcon}",
    "psc": "{kind: psc}",
    "hybrid_sc": "{kind: hybrid_sc}",
    "hybrid_psc": "{kind: hybrid_psc, positive_in_denominator: true}",
    "bcl": "{kind: bcl}",
    "paco": "{kind: paco, queue: 20, momentum: 0.9}",
    "cibl": "{kind: cibl}",
    "cibl_with_everything": "{kind: cibl, queue: 20, momentum: 0.9, kappa: 1, classify: first, normalize: true}",
    "cibl_with_a_queue": "{kind: cibl, queue: 20, classify: first}",
    "paco_without_an_average": "{kind: paco, queue: 20, momentum: null}",
    "cibl_first_view": "{kind: cibl, classify: first, normalize: true}",
    "cibl_by_class": "{kind: cibl, tail_skew: 2, normalize: class}",
    "supcon_with_sam": "{kind: supcon}",
    "cibl_in_micro_batches": "{kind: cibl, queue: 20, momentum: 0.9, classify: first}",
    "hybrid_psc_in_micro_batches": "{kind: hybrid_psc}",
    "paco_with_synced_norms": "{kind: paco, queue: 20, momentum: 0.9}",
}

# What fine-tuning trains: `train.tune` and `train.partial`.
TUNED = {
    "blocks": ("partial", LastBlocks(count=2)),
    "norms": ("partial", Norms(kind="norms")),
    "adapters": ("partial", Adapters(kind="adapters", rank=2)),
    "full": ("full", LastBlocks()),
    "classifier": ("classifier", LastBlocks()),
}


def per_sample(network):
    """The network with normalisation layers that see one sample at a time: batch statistics are each worker's own."""
    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.GroupNorm(4, child.num_features))
    return network


def steps_of(loss, world, batch=BATCH, parts=1):
    """What some steps of SGD give: the loss of each over the whole batch, and the last gradient by parameter.

    parts: micro-batches of a step, which have one contrastive set.
    """
    head = ["--network.head.kind", "cosine"] if "ldam" in loss else []
    options = ["--loss", LOSSES[loss], "--backbone", "resnet20", *head]
    config = build_config(read_config(find_config("quickstart")), options, "test")
    network = build_network(config.network, CLASSES, config.loss.needs, seed=0)
    if "synced" in loss:
        sync_batch_norm(network, world)
    else:
        per_sample(network)
    network.double()  # so that no ReLU switches over by rounding
    objective = Objective(config.loss, network, np.array([50, 20, 9, 3, 1]), torch.device("cpu"), world, batch)
    exchange = GradientExchange(network.parameters(), world, bucket_bytes=2**17)
    network.train()

    def gradients(streams):
        passes = None
        if parts > 1:
            views = [1 if objective.averaged is not None else 2, 2][: len(streams)]
            passes = CachedPasses(lambda network, pixels: network(pixels), parts, [len(streams[0].labels) * v for v in views])
        terms = objective(network, passes or (lambda network, pixels: network(pixels)), streams, progress=0.5)
        part = terms["loss"] * world.fraction(batch)
        if passes is None:
            with exchange.summing():
                part.backward()
        else:
            part.backward()
            passes.backward(exchange.summing())
        return part

    random = torch.Generator().manual_seed(1)
    rows, losses = world.share.of(batch), []
    for _ in range(STEPS):
        streams = []
        for _ in range(2 if "hybrid" in loss else 1):
            pixels = torch.randn(batch, 2, 3, 16, 16, generator=random, dtype=torch.float64)
            labels = torch.randint(CLASSES, (batch,), generator=random)
            mixed = (labels.flip(0)[rows], 0.7) if "mixed" in loss else None
            streams.append(Images(pixels[rows].flatten(0, 1), labels[rows], 2, mixed))
        network.zero_grad()
        objective.begin_step()
        part = gradients(streams)
        if "sam" in loss:
            with at_the_peak(network.parameters(), 0.05):
                gradients(streams)
        losses.append(world.sum(part.detach()).item())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 1e-3 * parameter.grad
    statistics = {name: value for name, value in network.named_buffers() if "running" in name}
    return (
        {"losses": torch.tensor(losses, dtype=torch.float64)}
        | statistics
        | {name: parameter.grad for name, parameter in network.named_parameters()}
    )


def tuned(tune, world):
    """The parameters after some steps of fine-tuning by AdamW, with batch norm that keeps its statistics."""
    config = build_config(read_config(find_config("quickstart")), ["--loss.kind", "balanced_softmax"], "test")
    network = build_network(config.network, CLASSES, config.loss.needs, seed=0)
    with torch.no_grad():  # statistics as of a trained network
        network.train()(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    network.freeze(*TUNED[tune], keep_statistics=True)
    # In float64: AdamW divides each gradient by its size, so one that is zero but for rounding moves a weight as far as others.
    network = network.double()
    objective = Objective(config.loss, network, np.array([50, 20, 9, 3, 1]), torch.device("cpu"), world, BATCH)
    optimizer = make_optimizer(network, OptimizerConfig(kind="adamw", lr=1e-3, layer_decay=0.75), fused=False)
    for group in optimizer.param_groups:
        group["lr"] *= group["scale"]
    exchange = GradientExchange(network.parameters(), world, bucket_bytes=2**17)
    network.train()
    random = torch.Generator().manual_seed(1)
    rows = world.share.of(BATCH)
    for _ in range(STEPS):
        pixels = torch.randn(BATCH, 3, 16, 16, generator=random, dtype=torch.float64)
        labels = torch.randint(CLASSES, (BATCH,), generator=random)
        terms = objective(
            network, lambda network, pixels: network(pixels), [Images(pixels[rows], labels[rows], 1)], progress=0.5
        )
        optimizer.zero_grad()
        with exchange.summing():
            (terms["loss"] * world.fraction(BATCH)).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters() if parameter.requires_grad}


def spawn(what, workers, folder, **environment):
    """This file's `what` in several processes; returns them, ended, with their output."""
    base = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(workers), "STORE": str(folder / "store")} | environment
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what, str(folder)],
            env=base | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(workers)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    for status, output in spawn("steps", 2, folder):
        assert status == 0, output
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_two_workers_compute_what_one_does(loss, two_workers):
    """7 samples over two workers, 3 and 4, or 8 in two micro-batches each: three losses, and the last gradients."""
    torch.set_num_threads(1)
    alone = steps_of(loss, World(), 8 if "micro_batches" in loss else BATCH)
    for rank in range(2):
        theirs = torch.load(two_workers / f"{loss}-{rank}.pt")
        assert theirs.keys() == alone.keys()
        assert torch.allclose(theirs.pop("losses"), alone["losses"], rtol=1e-9)
        whole = torch.cat([gradient.flatten() for name, gradient in alone.items() if name != "losses"]).norm()
        for name, gradient in theirs.items():
            # Each parameter's by its own norm; where that is next to nothing, sums cancel in it.
            assert (gradient - alone[name]).norm() <= 1e-9 * max(alone[name].norm(), 0.01 * whole), name


@pytest.mark.parametrize("tune", TUNED)
def test_two_workers_fine_tune_as_one_does(tune, two_workers):
    """With AdamW too, in float64: no worker's part of a batch decides anything."""
    if tune == "adapters":
        pytest.importorskip("peft")
    torch.set_num_threads(1)
    alone = tuned(tune, World())
    moved = max((value.abs().max() for name, value in alone.items() if "lora_B" in name), default=torch.tensor(1.0))
    assert moved > 1e-4  # adapters start from 0
    for rank in range(2):
        theirs = torch.load(two_workers / f"tuned-{tune}-{rank}.pt")
        assert theirs.keys() == alone.keys()
        for name, value in theirs.items():
            assert (value - alone[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "synced" not in loss and "sam" not in loss])
def test_micro_batches_with_one_contrastive_set_are_one_large_batch(loss):
    """8 samples in four micro-batches: what three steps give, so the queue and the averaged network count, too."""
    torch.set_num_threads(1)
    whole, parts = steps_of(loss, World(), batch=8), steps_of(loss, World(), batch=8, parts=4)
    assert torch.allclose(parts["losses"], whole["losses"], rtol=1e-9)
    of_all = torch.cat([gradient.flatten() for name, gradient in whole.items() if name != "losses"]).norm()
    for name, gradient in parts.items():
        assert (gradient - whole[name]).norm() <= 1e-9 * max(whole[name].norm(), 0.01 * of_all), name


def test_gathered_gradients_are_sums_over_workers(two_workers):
    content = json.loads((two_workers / "gather.json").read_text())
    assert content["gathered"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    # Worker r weighs every row by (r + 1)·(row + 1): a row's gradient is 3·(row + 1).
    assert content["gradient"] == [[3.0, 6.0, 9.0], [12.0, 15.0, 18.0, 21.0]]
    assert content["collected"] == [[0, 0], [1, 1], [1, 1]]
    assert content["first"] == "of rank 0"
    assert content["all_gather"] == ["of rank 0", "of rank 1"]


def test_gradients_are_summed_within_the_backward_pass(two_workers):
    """Bit for bit the sum of what each worker has by itself, after two micro-batches, in the parameters' own layout."""
    found = [torch.load(two_workers / f"exchange-{rank}.pt") for rank in range(2)]
    for rank, theirs in enumerate(found):
        # A bucket for each convolution; the last one is of the layer without a gradient, and waits for the end of the pass.
        assert (theirs["launched"], theirs["buckets"]) == (3, 4)
        assert theirs["without a gradient"] == [True, True]
        assert theirs["strides"], "a gradient lies in memory otherwise than its parameter"
        for name in theirs["own"]:
            assert torch.equal(theirs["summed"][name], found[0]["own"][name] + found[1]["own"][name]), (rank, name)


@pytest.mark.parametrize(("wire", "rounding"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_gradients_are_rounded_alike_on_their_way(two_workers, wire, rounding):
    first, second = (torch.load(two_workers / f"exchange-{rank}.pt")[wire] for rank in range(2))
    whole = torch.load(two_workers / "exchange-0.pt")["summed"]
    for name, gradient in first.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, second[name])
        assert not torch.equal(gradient, whole[name])
        assert torch.allclose(gradient, whole[name], rtol=2 * rounding, atol=2 * rounding * float(whole[name].abs().max()))


def test_statistics_are_averaged(two_workers):
    assert json.loads((two_workers / "statistics.json").read_text()) == [[1.5, 1.5], [1.5, 1.5]]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (nn.BatchNorm1d, (6, 4)),
        (lambda channels: nn.BatchNorm2d(channels, affine=False), (3, 4, 5, 5)),
        (nn.BatchNorm3d, (2, 4, 3, 3, 3)),
        (BatchNormAct2d, (3, 4, 5, 5)),
    ],
)
def test_a_synced_batch_norm_is_torchs_for_one_worker(make, shape, momentum):
    torch.manual_seed(0)
    norms = [make(shape[1]).double()]
    norms[0].momentum = momentum
    if norms[0].affine:
        nn.init.normal_(norms[0].weight)
    norms.append(SyncedBatchNorm(copy.deepcopy(norms[0]), World()))
    norms.append(copy.deepcopy(norms[1]))
    assert norms[2].world is norms[1].world
    found = []
    for norm in norms:
        random = torch.Generator().manual_seed(1)
        outputs = []
        for _ in range(2):
            x = (3 + torch.randn(shape, generator=random, dtype=torch.float64)).requires_grad_()
            y = norm.train()(x)
            (y * torch.randn(shape, generator=random, dtype=torch.float64)).sum().backward()
            outputs += [y.detach(), x.grad]
        with torch.no_grad():
            outputs.append(norm.eval()(x))
        found.append(outputs + [parameter.grad for parameter in norm.parameters()] + [*norm.state_dict().values()])
        assert norm.state_dict().keys() == norms[0].state_dict().keys()
    for other in found[1:]:
        assert all(torch.allclose(*pair, rtol=1e-10, atol=1e-12) for pair in zip(found[0], other, strict=True))


def test_a_lost_worker_is_named_so(tmp_path):
    (ended, _), (status, output) = sorted(spawn("lost", 2, tmp_path), key=lambda pair: "lost contact" in pair[1])
    assert ended == 3
    assert status == 0, output
    assert "lost contact with the other workers" in output


def test_a_worker_that_works_longer_than_the_others_wait_is_not_lost(tmp_path):
    for rank, (status, output) in enumerate(spawn("slow", 2, tmp_path)):
        assert status == 0, output
        assert output.splitlines() == ["made 0", str(rank), "too little memory"]


def test_one_process_is_a_world_of_its_own():
    world, x = World(), torch.randn(3)
    assert (world.rank, world.size, world.is_rank0, world.fraction(7)) == (0, 1, True, 1.0)
    assert world.gather(x, 3) is x
    assert world.gather_to_rank0(x) is x
    assert world.broadcast_from_rank0(lambda: "made") == "made"
    assert world.all_gather("made") == ["made"]
    assert world.work_together(lambda: "made") == "made"


def test_torchrun_starts_the_same_workers(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cibl_ray.train"]
    options = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "62", "--loader.kind", "torch", "--name", "two"]
    folders = ["--runs", str(tmp_path), "--prepared", str(tmp_path / "prepared")]
    done = subprocess.run([*command, "quickstart", *options, *folders], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "result.json").read_text())["workers"] == 2


@pytest.mark.parametrize(("number", "later"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGUSR1, 0.5)])
def test_workers_that_are_asked_to_stop_save_within_the_epoch(tmp_path, number, later):
    """torchrun passes SIGTERM on to both. SIGUSR1 is sent to one of them alone, sooner or later: both stop together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cibl_ray.train"]
    options = ["--epochs", "10000", "--batch_size", "62", "--loader.kind", "torch", "--checkpoint_every", "10000"]
    options += ["--name", "two"]
    folders = ["--runs", str(tmp_path), "--prepared", str(tmp_path / "prepared")]
    process = subprocess.Popen([*command, "quickstart", *options, *folders], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    while not read_metrics(tmp_path / "two"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(later)
    asked = psutil.Process(process.pid) if number == signal.SIGTERM else psutil.Process(process.pid).children()[-1]
    asked.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "resume with: python -m cibl_ray.train --resume" in errors
    checkpoint = load_checkpoint(tmp_path / "two" / "checkpoints" / "last.safetensors")
    assert (checkpoint.workers, checkpoint.epoch) == (2, read_metrics(tmp_path / "two")[-1]["epoch"])


def test_no_thread_of_the_exchange_outlives_leave(tmp_path):
    """Left to the end of Python, it aborts now and then: it drops tensors when there is no interpreter any more."""
    script = tmp_path / "script.py"
    script.write_text("""
import time
from contextlib import suppress
from pathlib import Path
from cibl_ray.world import join, leave

def threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it ended in between
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]

join()
began = time.monotonic()
while not (before := threads()) and time.monotonic() - began < 60:  # a thread takes its name itself, a moment after its start
    time.sleep(0.01)
import cibl_ray.training.trainer
leave()
print(bool(before), threads())
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert (done.stdout, done.returncode) == ("True []\n", 0), done.stderr


@pytest.mark.parametrize(("count", "workers"), [(7, 2), (2, 3), (0, 2), (128, 5)])
def test_shares_are_the_whole_and_even(count, workers):
    parts = [range(count)[Share(worker, workers).of(count)] for worker in range(workers)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _steps(world, folder):
    for loss in LOSSES:
        torch.save(steps_of(loss, world, *((8, 2) if "micro_batches" in loss else ())), folder / f"{loss}-{world.rank}.pt")
    for tune in TUNED:
        if tune != "adapters" or importlib.util.find_spec("peft") is not None:
            torch.save(tuned(tune, world), folder / f"tuned-{tune}-{world.rank}.pt")
    _exchanges(world, folder)
    rows = world.share.of(7)
    own = torch.arange(7.0)[rows, None].requires_grad_()
    everyone = world.gather(own, 7)
    ((world.rank + 1) * everyone * torch.arange(1.0, 8)[:, None]).sum().backward()
    gradients = [None, None]
    dist.all_gather_object(gradients, own.grad.flatten().tolist())
    collected = world.gather_to_rank0(torch.full((world.rank + 1, 2), world.rank))
    content = {
        "gathered": everyone.flatten().tolist(),
        "gradient": gradients,
        "collected": collected.tolist(),
        "first": world.broadcast_from_rank0(lambda: f"of rank {world.rank}"),
        "all_gather": world.all_gather(f"of rank {world.rank}"),
    }
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(world.rank + 1.0)
    norm.running_var.fill_(world.rank + 1.0)
    average_statistics([nn.Sequential(norm)], world)
    average_statistics([nn.LayerNorm(2)], world)  # a network without batch norm
    if world.is_rank0:
        (folder / "gather.json").write_text(json.dumps(content))
        (folder / "statistics.json").write_text(json.dumps([norm.running_mean.tolist(), norm.running_var.tolist()]))
    dist.barrier()


def _exchanges(world, folder):
    """A network with a layer that is not used and a frozen bias, trained with two micro-batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 5), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 8, 3, bias=False))
    network.append(nn.Linear(8, 5)).to(memory_format=torch.channels_last)
    network[4].bias.requires_grad_(False)
    parts = torch.randn(2, 2, 3, 2, 9, 9)[:, world.rank]

    def loss(pixels):
        return network[4](network[1:4](pixels).mean((2, 3))).square().mean()

    def gradients():
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}

    for part in parts:
        loss(part).backward()
    found = {"own": gradients()}
    for wire in (None, torch.bfloat16, torch.float16):
        network.zero_grad()
        exchange = GradientExchange(network.parameters(), world, bucket_bytes=400, wire=wire)
        loss(parts[0]).backward()
        with exchange.summing():
            loss(parts[1]).backward()
            launched = exchange._launched
        found[{None: "summed", torch.bfloat16: "bf16", torch.float16: "fp16"}[wire]] = gradients()
        if wire is None:
            found |= {"launched": launched, "buckets": len(exchange._buckets)}
            found["without a gradient"] = [network[4].bias.grad is None, network[0].weight.grad is None]
            found["strides"] = all(p.grad.stride() == p.stride() for p in network.parameters() if p.grad is not None)
    torch.save(found, folder / f"exchange-{world.rank}.pt")


def _lost(world, folder):
    if world.rank == 1:
        os._exit(3)
    try:
        world.sum(torch.ones(3))
    except PeerLostError as error:
        print(error)


def _slow(world, folder):
    """Rank 0, then rank 1, takes longer than the process group's timeout."""
    dist.barrier()  # the timeout below is also that of meeting
    world._cpu = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
    world_module._STILL_AT_WORK = 0.1

    def work(slow):
        time.sleep(3 * slow)
        return world.rank

    def fail():
        time.sleep(0.3)
        raise UserError("too little memory")

    print("made", world.broadcast_from_rank0(lambda: work(slow=True)))
    print(world.work_together(lambda: work(slow=world.rank == 1)))
    try:
        world.broadcast_from_rank0(fail)
    except UserError as error:
        print(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["STORE"], int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    {"steps": _steps, "lost": _lost, "slow": _slow}[sys.argv[1]](World(), Path(sys.argv[2]))
    dist.destroy_process_group()
