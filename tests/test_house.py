"""The rooms and the arrows between them: every import is read, those within functions and for type checkers too."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from cibl_ray.config import RunConfig
from cibl_ray.tuning.config import SweepConfig
from pipelines.common.fields import known_keys

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pipelines", "cibl_ray", "serve", "benchmarks")
# Each package imports itself and what stands before it; serve takes the contract with the exported model alone, no torch.
MAY_IMPORT = {
    "pipelines": {"pipelines"},
    "cibl_ray": {"pipelines", "cibl_ray"},
    "serve": {"pipelines", "cibl_ray", "serve"},
    "benchmarks": set(PACKAGES),
}
COMMANDS = {"train", "evaluate", "predict", "tune", "export"}
# The rooms of cibl_ray from the lowest floor to the highest: a room imports rooms of lower floors alone. `bundle` is what
# serve/ shares with it. The package itself is on no floor: it imports `api` when a name is first used.
FLOORS = (
    {"bundle", "networks", "world"},
    {"losses", "recipes"},
    {"config"},
    {"config_warnings", "hardware", "run"},
    {"evaluation", "features", "tracking"},
    {"training", "exporting"},
    {"cluster", "api"},
    {"tuning"},
    COMMANDS,
)


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; a package is its __init__."""
    found = {}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from a import b`: the module a.b where there is one, else a name within a.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {str(node.module)}
    return names & known


def graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports(path, set(files)) - {name} for name, path in files.items()}


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards(package):
    upward = {
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if name.partition(".")[0] == package and other.partition(".")[0] not in MAY_IMPORT[package]
    }
    assert not upward


def test_rooms_import_downwards():
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

    def room(name: str) -> str:
        package, _, rest = name.partition(".")
        return rest.partition(".")[0] if package == "cibl_ray" else ""

    arrows = {(name, other) for name, others in graph().items() for other in others if room(name) and room(other)}
    unknown = {room(name) for pair in arrows for name in pair} - {*floors}
    assert not unknown, "a room without a floor"
    upward = {f"{a} -> {b}" for a, b in arrows if room(a) != room(b) and floors[room(a)] <= floors[room(b)]}
    assert not upward


def test_nobody_imports_a_command():
    commands = {f"cibl_ray.{name}" for name in COMMANDS}
    assert not {f"{name} -> {other}" for name, others in graph().items() for other in others & commands}


def test_the_walk_sees_imports_of_every_kind(tmp_path):
    """The test's own eyes: an import within a function, for a type checker, of a module by name and of a name in it."""
    path = tmp_path / "a.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n"
        "def f():\n    from p import c, NAME\n    import p.d\n"
    )
    assert imports(path, {"p", "p.b", "p.c", "p.d", "p.e"}) == {"p.b", "p.c", "p.d"}


@pytest.mark.parametrize("model", [RunConfig, SweepConfig])
def test_every_field_has_a_description(model):
    """`--help` prints it. A part says what it is in the docstring of its model."""
    parts = {key.rpartition(".")[0] for key in known_keys(model)}
    bare = [
        key
        for key, known in known_keys(model).items()
        if not known.description and key not in parts and not key.endswith("kind") and not key.startswith("data.source.")
    ]
    assert bare == []


# What mends a fault of Ray's may use its insides, guardedly; nothing else may.
MAY_USE_RAYS_INSIDES = "cibl_ray/cluster/ray_workarounds.py"


def test_only_rays_documented_interface_is_used():
    private = re.compile(r"\bray\.(\w+\.)*_(?!_version__)|\bray\b.*_internal")
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("cibl_ray", "serve")
        for path in (REPOSITORY / package).rglob("*.py")
        if any(private.search(line) for line in path.read_text().splitlines())
    }
    assert found <= {MAY_USE_RAYS_INSIDES}


def private_names(path: Path) -> set[str]:
    """Names that begin with an underscore, of packages that are not the project's: imported, or attributes of what is."""
    imported: set[str] = set()
    found: set[str] = set()
    for node in ast.walk(tree := ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = f"{module}.{alias.name}".strip(".")
                if full.partition(".")[0] not in (*PACKAGES, "__future__", "os"):  # os._exit is documented
                    imported.add((alias.asname or alias.name).partition(".")[0])
                    found |= {full for part in full.split(".") if re.match("_[a-z]", part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                found.add(ast.unparse(node))
    return found


def test_no_private_name_of_a_dependency_is_used(tmp_path):
    found = {name: names for name, path in modules().items() if (names := private_names(path))}
    assert set(found) <= {"cibl_ray.cluster.ray_workarounds"}
    (tmp_path / "a.py").write_text(
        "import torch as t\nfrom ray._private import x\nt._foreach_lerp_([], [], 1)\nself._mine = t.nn\n"
    )
    assert private_names(tmp_path / "a.py") == {"t._foreach_lerp_", "ray._private.x"}
