"""`prepare --check` lists what is wrong with the images, and writes nothing."""

import shutil

import pytest

from pipelines.common.errors import UserError
from pipelines.prepare import __main__ as command
from pipelines.prepare.check import check
from pipelines.prepare.splits import choose
from tests.pipelines.test_prepare import folder_config


def test_everything_that_is_wrong_is_listed(image_folder, tmp_path):
    one = image_folder / "train" / "one"
    (one / "3.png").write_bytes(b"no image")
    (one / "4.png").write_bytes((one / "4.png").read_bytes()[:50])
    shutil.copy(one / "0.png", image_folder / "test" / "one" / "copy.png")
    (image_folder / "test" / "two" / "link.png").symlink_to(image_folder / "train" / "two" / "1.png")
    data = folder_config(image_folder, tmp_path)
    found = check(choose(data.source.open(), data, 0)[1], data, 0)
    assert found.images == 19 + 9 + 2
    assert [(place, reason.partition(" bytes")[0]) for place, reason in found.bad] == [
        (str(one / "3.png"), "8"),
        (str(one / "4.png"), "50"),
    ]
    assert found.copies == [
        "test test/one/copy.png\ttrain train/one/0.png",
        "test test/two/link.png\ttrain train/two/1.png",
    ]
    assert found.shared.startswith("1 test image is also in train: the same files, such as 'train/two/1.png'")
    assert found.summary() == (
        "30 images: 2 unreadable, 2 copies (2 test images are also in train), and files that are in two places"
    )
    assert len(found.lines()) == 5


def test_the_flag(image_folder, tmp_path, monkeypatch, capsys):
    def run():
        source = ["--data.source.kind", "folder", "--data.source.path", str(image_folder)]
        arguments = ["prepare", "folder", "--check", *source, "--prepared", str(tmp_path / "prepared"), "--val_fraction", "0"]
        monkeypatch.setattr("sys.argv", arguments)
        command.main()
        return capsys.readouterr().out

    assert run().splitlines() == ["28 images: 0 unreadable, 0 copies"]
    bad = image_folder / "test" / "two" / "0.png"
    bad.write_bytes(b"")
    with pytest.raises(UserError, match="28 images: 1 unreadable, 0 copies"):
        run()
    assert capsys.readouterr().out.startswith(f"unreadable: {bad}: 0 bytes")
    assert not (tmp_path / "prepared").exists()
