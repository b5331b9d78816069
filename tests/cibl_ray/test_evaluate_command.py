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
