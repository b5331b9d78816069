"""A run's copy in an object store: what it holds, which side counts, and what an upload that fails leaves."""

import hashlib
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import save as to_bytes

from cibl_ray.cluster.storage import Mirror, fetched, join, split, sync_with_copy, tidy
from cibl_ray.cluster.uploads import uploads
from cibl_ray.run.folder import PREVIOUS
from cibl_ray.run.progress import Lines, Silent
from pipelines.common.errors import UserError

LAST = "checkpoints/last.safetensors"


def test_a_stores_run_never_replaces_another(tmp_path):
    store = f"{tmp_path.as_uri()}/store"
    assert join("s3://bucket/runs/?region=x", "a") == "s3://bucket/runs/a?region=x"
    assert split("s3://bucket/runs/a?region=x") == ("s3://bucket/runs?region=x", "a")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine")
    mirror = Mirror(folder, join(store, "a"))
    with pytest.raises(UserError, match="holds another run"):
        mirror.claim(resume=False)  # a new run, on a node that has an older one of the name
    mirror.claim(resume=True)  # a run that goes on, and has a copy from now on
    mirror.upload()
    assert mirror.exists()
    other = tmp_path / "other" / "a"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("another")
    with pytest.raises(UserError, match="holds another run"):
        Mirror(other, join(store, "a")).claim(resume=True)
    assert (other / "config.yaml").read_text() == "another"
    with pytest.raises(UserError, match="cannot be reached"):
        Mirror(folder, "nothing://here")


def test_a_place_has_one_spelling(tmp_path, monkeypatch):
    """A slash at the end, and a path in the place of a URI: by whichever a run began, by each it is the same run."""
    assert tidy("s3://bucket/runs/a/?region=x") == "s3://bucket/runs/a?region=x"
    assert tidy("/mnt/my backup/") == "file:///mnt/my%20backup"
    with pytest.raises(UserError, match=r"storage '~nobody-of-that-name/x': there is no such user"):
        tidy("~nobody-of-that-name/x")
    monkeypatch.chdir(tmp_path)
    store, folder = f"{tmp_path.as_uri()}/store", tmp_path / "runs" / "a"
    saved(folder, 1)
    assert sync_with_copy(folder, f"{store}/") == f"{store}/"
    assert fetched(f"{store}/a/") == (store, folder)
    assert (folder / ".storage").read_text() == f"{store}/a"
    for earlier in (f"{store}/a/", str(tmp_path / "store" / "a")):  # what earlier versions wrote there
        (folder / ".storage").write_text(earlier)
        assert sync_with_copy(folder, None) == store
        assert fetched(f"{store}/a/") == (store, folder)


def test_what_an_earlier_run_of_the_name_left_on_a_node_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, folder = f"{tmp_path.as_uri()}/store", tmp_path / "runs" / "a"
    uri, copy = f"{store}/a", tmp_path / "store" / "a"
    Mirror(folder, uri).claim(resume=False, run="a-1")
    left = saved(folder, 3)
    mirror = Mirror(folder, uri)
    mirror.claim(resume=False, run="a-1")  # workers that replace lost ones
    mirror.upload()
    assert json.loads((copy / "manifest.json").read_text())["run"] == "a-1"
    assert fetched(uri) == (store, folder)
    assert (folder / ".storage").read_text() == f"{uri}\na-1"
    shutil.rmtree(copy)
    told = pytest.raises(UserError, match="holds an earlier run than .*store/a; move it away, or choose another --name")
    for written in (f"{uri}\na-1", uri):  # an earlier version wrote the place alone
        (folder / ".storage").write_text(written)
        with told:
            Mirror(folder, uri).claim(resume=False, run="a-2")
    # The new run begins on another node, and is resumed where the earlier one has been trained further.
    other = Mirror(tmp_path / "other" / "a", uri)
    other.claim(resume=False, run="a-2")
    begun = saved(tmp_path / "other" / "a", 1)
    other.upload()
    (folder / ".storage").write_text(f"{uri}\na-1")
    with told:
        fetched(uri)
    assert ((folder / LAST).read_bytes(), (copy / LAST).read_bytes()) == (left, begun)
    fresh = Mirror(tmp_path / "fresh" / "a", uri)
    fresh.claim(resume=True)
    assert (tmp_path / "fresh" / "a" / ".storage").read_text() == f"{uri}\na-2"


def saved(folder, epoch, step=0):
    """A run folder with a checkpoint."""
    path = folder / LAST
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0")
    path.write_bytes(to_bytes({"x": torch.zeros(1)}, {"cibl_ray": json.dumps({"epoch": epoch, "step": step})}))
    return path.read_bytes()


def test_a_copy_never_replaces_what_has_been_trained_further(tmp_path):
    uri = f"{tmp_path.as_uri()}/store/a"
    folder, copy = tmp_path / "runs" / "a", tmp_path / "store" / "a" / LAST
    old = saved(folder, 10, 7)
    mirror = Mirror(folder, uri)
    mirror.claim(resume=True)
    assert mirror.behind()
    mirror.upload()
    assert not mirror.behind()
    new = saved(folder, 10, 8)
    with pytest.raises(UserError, match=r"epoch 10, step 8\).*store/a \(epoch 10, step 7\); resume with --resume .* --cluster"):
        Mirror(folder, uri).download()
    assert (folder / LAST).read_bytes() == new
    (folder / LAST).write_bytes(new[:-1])  # cut short, it is none
    Mirror(folder, uri).download()
    assert (folder / LAST).read_bytes() == old == copy.read_bytes()


def test_a_run_that_goes_on_by_its_folder_keeps_its_copy(tmp_path, monkeypatch):
    store, folder = f"{tmp_path.as_uri()}/store", tmp_path / "runs" / "a"
    copy = tmp_path / "store" / "a" / LAST
    saved(folder, 1)
    assert sync_with_copy(folder, None) is None
    assert sync_with_copy(folder, store) == store
    new = saved(folder, 2)  # in one process, without the copy
    assert sync_with_copy(folder, None) == store
    assert copy.read_bytes() == new
    further = saved(tmp_path / "store" / "a", 3)  # on another machine
    assert sync_with_copy(folder, None) == store
    assert (folder / LAST).read_bytes() == further
    # By its URI, too: a driver that was killed had saved what it had not sent yet.
    monkeypatch.chdir(tmp_path)
    newest = saved(folder, 4)
    assert fetched(f"{store}/a") == (store, folder)
    assert (folder / LAST).read_bytes() == copy.read_bytes() == newest
    further = saved(tmp_path / "store" / "a", 5)
    assert fetched(f"{store}/a") == (store, folder)
    assert (folder / LAST).read_bytes() == further
    folder.rename(tmp_path / "runs" / "b")
    with pytest.raises(UserError, match="rename the folder to a, or give --storage"):
        sync_with_copy(tmp_path / "runs" / "b", None)
    assert sync_with_copy(tmp_path / "runs" / "b", store) == store
    assert (tmp_path / "store" / "b" / LAST).read_bytes() == further


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_copys_manifest_says_what_an_upload_that_was_cut_short_has_changed(tmp_path, monkeypatch, caplog):
    folder, store = tmp_path / "runs" / "a", tmp_path / "store" / "a"
    mirror = Mirror(folder, store.as_uri())
    first = saved(folder, 1)
    mirror.upload()
    (folder / "checkpoints" / PREVIOUS).hardlink_to(folder / LAST)  # as a checkpoint that is saved keeps the one before it
    (folder / LAST).unlink()
    second = saved(folder, 2)
    sent = []
    monkeypatch.setattr(Mirror, "_stream", lambda *given, stream=Mirror._stream: sent.append(given[1].name) or stream(*given))
    mirror.upload()
    assert sent == ["config.yaml", LAST]  # the store copied the checkpoint before it by itself
    assert (store / LAST).read_bytes() == second
    assert (store / "checkpoints" / PREVIOUS).read_bytes() == first
    files = json.loads((store / "manifest.json").read_text())["files"]
    assert files == {name: {"sha256": digest_of(store / name)} for name in ("config.yaml", LAST, f"checkpoints/{PREVIOUS}")}
    # The next upload ends between the last checkpoint and the manifest.
    (folder / "checkpoints" / PREVIOUS).unlink()
    (folder / LAST).rename(folder / "checkpoints" / PREVIOUS)
    saved(folder, 3)
    monkeypatch.setattr(Mirror, "_list", lambda *given: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        mirror.upload()
    fresh = tmp_path / "fresh" / "a"
    Mirror(fresh, store.as_uri()).download()
    assert not (fresh / LAST).exists()  # not in the manifest
    assert (fresh / "checkpoints" / PREVIOUS).read_bytes() == second
    assert not [*fresh.rglob("*.part")]
    assert "is not what the copy's manifest says" in caplog.text
    # A copy of an earlier version has no manifest; one of a damaged manifest is as good.
    for content in (None, "[", '{"files": 1}'):
        (store / "manifest.json").unlink()
        if content is not None:
            (store / "manifest.json").write_text(content)
        again = tmp_path / f"again{content}" / "a"
        Mirror(again, store.as_uri()).download()
        assert (again / LAST).read_bytes() == (folder / LAST).read_bytes()
        (store / "manifest.json").touch()


def test_a_copy_is_sent_beside_training_and_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cibl_ray.cluster.uploads._WAIT", 0.01)
    folder, store = tmp_path / "runs" / "a", tmp_path / "store" / "a"
    mirror = Mirror(folder, store.as_uri())
    begun, free, failures = threading.Event(), threading.Event(), [OSError("500"), OSError("503")]
    send = Mirror.send

    def slow(self, files):
        begun.set()
        assert free.wait(60)
        if failures:
            raise failures.pop(0)
        send(self, files)

    monkeypatch.setattr(Mirror, "send", slow)
    with uploads(mirror, Silent()) as take:
        saved(folder, 1)
        take()
        assert begun.wait(60)  # the first is being sent
        saved(folder, 2)
        take()  # returns at once
        newest = saved(folder, 3)
        take()
        assert not store.exists()
        free.set()
    assert failures == []
    assert (store / LAST).read_bytes() == newest  # the block waits for the last one
    assert "upload 1 of 5 failed: 500" in caplog.text
    failures += [OSError("busy"), *[ValueError("full")] * 4]  # pyarrow raises both
    shown = []
    progress = Silent()
    progress.line = shown.append
    progress.log_handler = lambda: Lines(progress)
    with (
        pytest.raises(UserError, match=r"store/a is not up to date: full; all files are in the run folder"),
        uploads(mirror, progress) as take,
    ):
        free.clear()
        saved(folder, 4)
        take()
        threading.Timer(0.2, free.set).start()  # after the block, whose training shows messages itself
    assert [line.partition("a: ")[2] for line in shown[-5:]] == ["upload 1 of 5 failed: busy"] + [
        f"upload {number} of 5 failed: full" for number in range(2, 6)
    ]
    with pytest.raises(KeyboardInterrupt), uploads(mirror, Silent()) as take:  # a run that is stopped has sent what it saved
        stopped = saved(folder, 5)
        take()
        raise KeyboardInterrupt
    assert (store / LAST).read_bytes() == stopped
    with uploads(None, Silent()) as take:
        assert take is None


def test_a_copy_on_an_s3_server(tmp_path, monkeypatch):
    server_of_moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = server_of_moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="runs")
        uri = f"s3://runs/of/a?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        folder = tmp_path / "a"
        mirror = Mirror(folder, uri)
        saved(folder, 1)
        mirror.upload()
        (folder / LAST).rename(folder / "checkpoints" / PREVIOUS)
        saved(folder, 2)
        mirror.upload()
        names = {item["Key"] for item in client.list_objects_v2(Bucket="runs")["Contents"] if not item["Key"].endswith("/")}
        assert names == {f"of/a/{name}" for name in ("config.yaml", "manifest.json", LAST, f"checkpoints/{PREVIOUS}")}
        other = tmp_path / "other" / "a"
        Mirror(other, uri).download()
        for name in ("config.yaml", LAST, f"checkpoints/{PREVIOUS}"):
            assert (other / name).read_bytes() == (folder / name).read_bytes()
    finally:
        server.stop()
