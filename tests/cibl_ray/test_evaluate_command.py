"""The evaluate command says what a folder without classes is good for."""

import pytest

from cibl_ray import evaluate
from pipelines.common.errors import UserError


def test_a_folder_of_images_without_classes(image_folder, monkeypatch):
    folder = image_folder / "train" / "one"
    monkeypatch.setattr("sys.argv", ["evaluate", "runs/a", "--data", str(folder)])
    with pytest.raises(UserError) as caught:
        evaluate.main()
    message = str(caught.value)
    assert message.startswith(f"--data {folder}: 6 images are directly in it, without classes; to evaluate, put them into")
    assert f"{folder}/CLASS/*" in message
    assert message.endswith(f"python -m cibl_ray.predict runs/a {folder}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "few"], "--metric few says how --tail-shift auto chooses; add that"),
        (["--json", "."], "is a folder; name a file in it"),
        (["--checkpoint", "best"], "--checkpoint best is for a run folder, and .*last.safetensors' is a file"),
    ],
)
def test_options_that_say_nothing_here_are_refused(more, message, tmp_path, monkeypatch):
    (tmp_path / "last.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "last.safetensors"), *more])
    with pytest.raises(UserError, match=message):
        evaluate.main()
