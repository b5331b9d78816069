"""Checkpoints rebuild the network alone, are whole or refused, and keep the one before."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cibl_ray.config import load_config
from cibl_ray.networks.config import Needs
from cibl_ray.networks.network import build_network
from cibl_ray.run.checkpoint import Checkpoint, find_newest, load_checkpoint, load_weights, save_checkpoint
from pipelines.common.errors import UserError


def checkpoint(epoch=3, flags=(), average=None):
    config = load_config("quickstart", list(flags))
    network = build_network(config.network, 3, config.loss.needs, seed=epoch)
    momentum = {name: torch.full_like(p, 0.5) for name, p in network.named_parameters()}
    return Checkpoint(
        config, ["a", "b", "c"], np.array([9, 5, 2]), {"train": "x"}, epoch, 4, 2, {"epoch": 2, "balanced": 0.5},
        network.state_dict(), momentum, {"queue.written": torch.tensor(7)}, average or {},
    )  # fmt: skip


def test_round_trip(tmp_path):
    saved = checkpoint()
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.config == saved.config
    assert (loaded.classes, loaded.train_counts.tolist(), loaded.epoch) == (["a", "b", "c"], [9, 5, 2], 3)
    assert loaded.best == {"epoch": 2, "balanced": 0.5}
    assert (loaded.step, loaded.workers) == (4, 2)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in saved.weights.items())
    assert set(loaded.optimizer) == set(saved.optimizer)
    assert loaded.objective == {"queue.written": torch.tensor(7)}
    rebuilt = loaded.network().state_dict()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in saved.weights.items())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_architecture(tmp_path):
    config = load_config("quickstart", ["--backbone", "resnet32"])
    with pytest.raises(UserError, match=r"another architecture: it was made by resnet20 with a linear head"):
        load_weights(build_network(config.network, 3, Needs(projection=True), 0), checkpoint())
    with pytest.raises(UserError, match="and 3 classes; 2 tensors differ, the first is 'head.weight'"):
        load_weights(build_network(load_config("quickstart", []).network, 5, Needs(projection=True), 0), checkpoint())


def test_cut_short_falls_back_to_the_one_before(tmp_path, caplog):
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.safetensors", checkpoint(epoch), keep_previous=True)
    found = find_newest(tmp_path).checkpoint
    assert found is not None
    assert found.epoch == 2
    whole = (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(whole[: len(whole) // 2])
    found = find_newest(tmp_path).checkpoint
    assert found is not None
    assert found.epoch == 1
    assert "resuming from the one before, after epoch 1" in caplog.text
    (tmp_path / "previous.safetensors").unlink()
    with pytest.raises(UserError, match="is cut short or damaged"):
        find_newest(tmp_path)


def test_a_damaged_one_never_takes_the_place_of_the_good_one_before(tmp_path):
    """The run that fell back saves again, and is then cut short once more."""
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.safetensors", checkpoint(epoch), keep_previous=True)
    for epoch in (3, 4):
        whole = (tmp_path / "last.safetensors").read_bytes()
        (tmp_path / "last.safetensors").write_bytes(whole[: len(whole) // 2])
        save_checkpoint(tmp_path / "last.safetensors", checkpoint(epoch), keep_previous=True)
        assert load_checkpoint(tmp_path / "last.safetensors").epoch == epoch
        assert load_checkpoint(tmp_path / "previous.safetensors").epoch == 1
    save_checkpoint(tmp_path / "last.safetensors", checkpoint(5), keep_previous=True)
    assert load_checkpoint(tmp_path / "previous.safetensors").epoch == 4
    assert {file.name for file in tmp_path.iterdir()} == {"last.safetensors", "previous.safetensors"}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.safetensors", checkpoint(epoch), keep_previous=True)
    assert [load_checkpoint(tmp_path / f"{name}.safetensors").epoch for name in ("previous", "last")] == [1, 2]


def test_another_bit_in_a_tensor_is_noticed(tmp_path):
    """safetensors itself checks lengths alone. A file of an earlier version has no checksum, and is read."""
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(UserError, match="is damaged: its tensors are not those that were saved"):
        load_checkpoint(path)
    path.write_bytes(whole.replace(b"crc32", b"older", 1))
    assert load_checkpoint(path).epoch == 2
    save_checkpoint(tmp_path / "last.safetensors", checkpoint(3))
    path.write_text("no")
    with pytest.raises(UserError, match="cut short or damaged.*; whole checkpoints beside it: last.safetensors"):
        load_checkpoint(path)


def test_killed_between_the_two_renames(tmp_path):
    save_checkpoint(tmp_path / "last.safetensors", checkpoint(4))
    (tmp_path / "last.safetensors").rename(tmp_path / "previous.safetensors")
    found = find_newest(tmp_path).checkpoint
    assert found is not None
    assert found.epoch == 4
    assert find_newest(tmp_path / "elsewhere").checkpoint is None


def test_foreign_files(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of cibl-ray"):
        load_checkpoint(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="cut short or damaged"):
        load_checkpoint(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_full_disk_keeps_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, checkpoint(1), keep_previous=True)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, checkpoint(2), keep_previous=True)
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]
    assert load_checkpoint(path).epoch == 1
