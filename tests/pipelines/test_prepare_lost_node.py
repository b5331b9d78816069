"""Preparing on a cluster, one node of which is lost while it encodes."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from cibl_ray.cluster.environment import configure_ray_env
from pipelines.prepare import on_ray
from pipelines.prepare.sources import FolderSource, Images
from pipelines.prepare.writer import write_split
from tests.conftest import data_config

configure_ray_env(own=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # two nodes start, and one of them is missed


@pytest.fixture
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes of one CPU on this machine: (cluster, second node)."""
    from ray.cluster_utils import Cluster

    # How soon the head node misses a node that was killed: by default after 15 seconds.
    with patch.dict(os.environ, {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "500"}):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster, cluster.add_node(num_cpus=1)
    cluster.shutdown()
    with warnings.catch_warnings():  # Ray leaves the handles of its processes to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def stuck_images(photo_folder: Path, node: str, mark: Path) -> Images:
    """Photographs. The first that a node reads is never read to its end: the node is lost before.

    Args:
        photo_folder: The photographs.
        node: The node.
        mark: A file that says that it has begun to read.
    """

    class Stuck:
        """Within a function, so that it travels to tasks by value."""

        def __init__(self, pixels: list[bytes]) -> None:
            self._pixels = pixels

        def read(self, index: int) -> bytes:
            import ray

            if ray.is_initialized() and ray.get_runtime_context().get_node_id() == node:
                mark.touch()
                time.sleep(600)
            return self._pixels[index]

        def take(self, indices: np.ndarray) -> Stuck:
            return Stuck([self._pixels[index] for index in indices])

        def place(self, index: int) -> str:
            return f"image {index}"

        def stamp(self):
            yield b""

    train = FolderSource(kind="folder", path=photo_folder).open().train
    return Images(train.names, train.labels, content=Stuck([train.read(index) for index in range(len(train))]))


def test_a_lost_node_changes_nothing(two_nodes, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "_AT_ONCE", 4)
    cluster, second = two_nodes
    mark = tmp_path / "mark"
    data = data_config(store={"mode": "raw", "shard_mb": 1})
    images = stuck_images(photo_folder, second.node_id, mark)
    for name in ("alone", "tasks"):
        (tmp_path / name).mkdir()
    write_split(tmp_path / "alone", "train", images, data, 0)

    def lose() -> None:
        while not mark.exists():
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    with on_ray.cluster(cluster.address):
        write_split(tmp_path / "tasks", "train", images, data, 0, packer=on_ray.RayPacker(2))
    loser.join(60)
    assert mark.exists()
    assert not loser.is_alive()
    alone, tasks = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("alone", "tasks"))
    assert alone == tasks
    assert "train-00002.beton" in alone
