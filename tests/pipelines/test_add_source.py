"""The example of CONTRIBUTING.md adds a source as it stands: one file, one import and one line in the union."""

import re
import shutil
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_the_example_of_contributing(image_folder, tmp_path):
    text = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("### Example: a source of images")[2]
    module, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    top = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "pipelines", top / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    sources = top / "pipelines" / "prepare" / "sources"
    (sources / "prefixed.py").write_text(module)
    union = (sources / "__init__.py").read_text()
    union = union.replace("    | DigitsSource,\n", f"    | DigitsSource\n{line.rstrip()},\n")
    union = union.replace("\nSource = ", "from pipelines.prepare.sources.prefixed import PrefixedSource\n\nSource = ")
    (sources / "__init__.py").write_text(union)
    images = tmp_path / "flat"
    images.mkdir()
    for file in (image_folder / "train").rglob("*.png"):
        shutil.copy(file, images / f"{file.parent.name}_{file.name}")
    (tmp_path / "c.yaml").write_text(f"data: {{source: {{kind: prefixed, path: {images}}}, prepared: {tmp_path / 'prepared'}}}")

    def run(*arguments):
        command = [sys.executable, "-m", "pipelines.prepare", str(tmp_path / "c.yaml"), *arguments]
        return subprocess.run(command, cwd=top, capture_output=True, text=True, env={"PYTHONPATH": str(top)})

    done = run("--count")
    assert done.returncode == 0, done.stderr
    assert "train: 15 images, 3 classes, 4 to 6 a class" in done.stdout
    mistake = run("--data.source.path", str(tmp_path / "nowhere"))
    assert mistake.returncode == 2
    assert mistake.stderr.endswith("has no image CLASS_NAME.jpg; set data.source.path\n")
