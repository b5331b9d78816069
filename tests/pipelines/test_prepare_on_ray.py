"""Preparing by tasks of Ray: the same bytes as one process writes, also where a worker is lost."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cibl_ray.cluster.environment import configure_ray_env
from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import DataConfig
from pipelines.prepare import __main__ as command
from pipelines.prepare import on_ray
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.sources import FolderSource, Images
from pipelines.prepare.writer import write_split
from tests.commands import in_process
from tests.conftest import REPOSITORY, data_config, digits_config

configure_ray_env(own=True)

from cibl_ray.cluster.session import cluster  # noqa: E402


@pytest.fixture(scope="module")
def running():
    """One cluster for all tests."""
    with cluster(None):
        yield
    with warnings.catch_warnings():  # Ray leaves the handles of its processes to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def files_of(folder: Path) -> dict[str, bytes]:
    """All that preparing left, without the lock and the picture, which names its folder's time."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock" and path.suffix != ".png"}


def both(data: DataConfig, tmp_path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What one process and what two tasks write."""
    alone = ensure_prepared(data.model_copy(update={"prepared": tmp_path / "alone"}), 0)
    tasks = ensure_prepared(data.model_copy(update={"prepared": tmp_path / "tasks"}), 0, packer=on_ray.RayPacker(2))
    return files_of(alone.folder), files_of(tasks.folder)


@pytest.mark.parametrize("kind", ["folder", "archive", "parquet", "digits"])
def test_tasks_write_the_same_bytes(running, photo_folder, tmp_path, kind):
    source = {"kind": "folder", "path": str(photo_folder)}
    data = data_config(source=source, val_fraction=0.2, store={"mode": "mixed"}, size=32)
    if kind == "archive":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for path in sorted(photo_folder.rglob("*.jpg")):
                archive.write(path, path.relative_to(photo_folder))
        data = data_config(source={"kind": "archive", "path": str(tmp_path / "a.zip")}, size=32)
    elif kind == "parquet":
        train = FolderSource(kind="folder", path=photo_folder).open().train
        cells = [train.read(index) for index in range(len(train))]
        table = pa.table({"image": [*cells, b"no image"], "label": [*train.labels.tolist(), 0]})
        pa.parquet.write_table(table, tmp_path / "a.parquet")
        source = {"kind": "table", "path": str(tmp_path / "a.parquet")}
        data = data_config(source=source, on_bad_image="skip", size=32)
    elif kind == "digits":
        data = digits_config(tmp_path)
    alone, tasks = both(data, tmp_path)
    assert alone == tasks
    assert "train.beton" in alone


def test_several_files_with_a_bad_image(running, photo_folder, tmp_path):
    folder = Path(shutil.copytree(photo_folder, tmp_path / "images"))
    (folder / "train" / "china" / "3.jpg").write_bytes(b"\xff\xd8 no image")
    data = data_config(
        source={"kind": "folder", "path": str(folder)}, on_bad_image="skip", store={"mode": "raw", "shard_mb": 1}, size=32
    )
    alone, tasks = both(data, tmp_path)
    assert alone == tasks
    assert "train-00002.beton" in alone
    with pytest.raises(UserError, match=r"china/3\.jpg: unreadable image"):
        ensure_prepared(
            data.model_copy(update={"on_bad_image": "error", "prepared": tmp_path / "p"}), 0, packer=on_ray.RayPacker(2)
        )


def fatal_images(photo_folder: Path, mark: Path, heal: bool) -> Images:
    """Photographs. The last one in the order of writing ends the process that reads it, until a file exists.

    Args:
        photo_folder: The photographs.
        mark: The file.
        heal: Whether the process makes the file before it ends.
    """
    here = os.getpid()

    class Fatal:
        """Within a function, so that it travels to tasks by value."""

        def __init__(self, pixels: list[bytes], fatal: int | None) -> None:
            self._pixels, self._fatal = pixels, fatal

        def read(self, index: int) -> bytes:
            if index == self._fatal and os.getpid() != here and not mark.exists():
                if heal:
                    mark.touch()
                os._exit(1)
            return self._pixels[index]

        def take(self, indices: np.ndarray) -> Fatal:
            rows = indices.tolist()
            return Fatal([self._pixels[row] for row in rows], rows.index(self._fatal) if self._fatal in rows else None)

        def place(self, index: int) -> str:
            return f"image {index}"

        def stamp(self):
            yield b""

    train = FolderSource(kind="folder", path=photo_folder).open().train
    last = int(stream(0, "write", "train").permutation(len(train))[-1])
    return Images(train.names, train.labels, content=Fatal([train.read(index) for index in range(len(train))], last))


def written(folder: Path, images: Images, packer: on_ray.RayPacker | None) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    write_split(folder, "train", images, data_config(store={"mode": "raw", "shard_mb": 1}), 0, packer=packer)
    return files_of(folder)


def test_a_lost_worker_changes_nothing(running, photo_folder, tmp_path):
    images = fatal_images(photo_folder, tmp_path / "mark", heal=True)
    alone = written(tmp_path / "alone", images, None)
    assert written(tmp_path / "tasks", images, on_ray.RayPacker(2)) == alone
    assert (tmp_path / "mark").exists()


def test_a_task_that_is_lost_for_good_keeps_the_finished_files(running, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_ray, "_AT_ONCE", 4)
    monkeypatch.setattr(on_ray, "_RETRIES", 0)
    images = fatal_images(photo_folder, tmp_path / "mark", heal=False)
    alone = written(tmp_path / "alone", images, None)
    with pytest.raises(UserError, match=r"lost for good: .*; stopped: \d+ of 24 train images .* continues") as caught:
        written(tmp_path / "tasks", images, on_ray.RayPacker(2))
    assert "\n" not in str(caught.value)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tasks").glob("*.beton")}
    assert len(kept) > 1
    (tmp_path / "mark").touch()
    capsys.readouterr()
    assert written(tmp_path / "tasks", images, on_ray.RayPacker(2)) == alone
    assert "data: train continues after" in capsys.readouterr().err
    assert {name: (tmp_path / "tasks" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_node_that_does_not_see_the_images_is_told(running, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "_first_file", lambda _: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"does not see '.*nowhere'; the images must lie in a folder that all nodes see"):
        ensure_prepared(digits_config(tmp_path), 0, packer=on_ray.RayPacker(1))


def test_the_command_prepares_on_a_cluster_of_its_own(tmp_path):
    options = ["quickstart", "--cluster", "--workers", "2", "--data.prepared", str(tmp_path / "p")]
    words = [sys.executable, "-m", "pipelines.prepare", *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "train: 398 images" in done.stdout


def test_options_that_cannot_be_are_told():
    done = in_process(command.main, "quickstart", "--workers", "2")
    assert "--workers belongs to --cluster: add that" in done.stderr
    done = in_process(command.main, "quickstart", "--cluster", "--workers", "0")
    assert "--workers 0: at least 1" in done.stderr


def test_a_cluster_that_does_not_start_is_told_in_a_line(monkeypatch):
    import ray

    def late(**_: object) -> None:
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(UserError, match="does not start or answer at here:1: The current node timed out during startup"),
        on_ray.cluster("here:1"),
    ):
        pass
