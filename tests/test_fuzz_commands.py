"""2,000 mutations of configurations and command lines: each is accepted, or refused in one line; none ends in a traceback."""

import contextlib
import random
import sys

import pytest
import yaml

from cibl_ray import evaluate, export, train, tune
from cibl_ray.config import RunConfig, load_config
from pipelines import preview
from pipelines.common.errors import UserError
from pipelines.common.fields import known_keys
from pipelines.prepare import __main__ as prepare
from tests.conftest import REPOSITORY

CONFIGS = [path for path in sorted((REPOSITORY / "configs").rglob("*.yaml")) if path.parent.name != "cluster"]
TEXTS = [path.read_text() for path in CONFIGS]
VALUES = [
    "", " ", "null", "~", "true", "no", "-1", "0", "1e999", ".nan", "-.inf", "9" * 20, "9" * 5000, "1_000", "0x1f",
    "0o17", "2024-13-45", "12:30:45", "a: b", "[", "[]", "[[]]", "{}", "{", "{kind: folder}", "{kind: {}}", "{kind: [1]}",
    "[{}]", "&a [*a]", "*a", "!!python/object:os.system x", "!!binary x", "!!set {a}", "<<: {a: 1}", "? [a]", "? {a: 1}", "'",
    '"\\ud800"', "\u0000", "\u2028", "\ufeff", "é", "λ", "😀", "e\u0301", "%", "@x", "`x", "\t", "|", "> x", "--- a", "...",
    "/", "..", "~/x", "~nobody/x", "a" * 300, "[" * 3000, "digits", "folder", "cosine", "--", "-", "=",
]  # fmt: skip
OPTIONS = {
    train: ["--name", "--resume", "--workers", "--address", "--storage", "--cpus-per-worker", "--max-failures", "--cluster"],
    tune: ["--name", "--sweeps", "--resume", "--address", "--help"],
    prepare: ["--count", "--help"],
    preview: ["--out", "--images", "--epoch", "--help"],
    evaluate: ["--checkpoint", "--data", "--split", "--json"],
    export: ["--checkpoint", "--precision", "--out", "--name", "--target", "--max-drop", "--calibration"],
}  # fmt: skip
FIELDS = sorted(known_keys(RunConfig))


def mutated(text: str, draw: random.Random) -> str:
    """A configuration with one to three things wrong."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        line, at = draw.randrange(len(lines)), draw.randrange(len(text) + 1)
        kind = draw.randrange(9)
        if kind == 0:
            text = text[:at] + draw.choice(VALUES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + draw.randint(1, 4) :]
        elif kind == 2:
            text = text[:at]
        elif kind == 3:
            text = "\n".join([*lines[:line], lines[line], *lines[line:]])
        elif kind == 4:
            text = "\n".join([*lines[:line], *lines[line + 1 :]])
        elif kind == 5:
            text = "\n".join([*lines[:line], f"{lines[line].partition(':')[0]}: {draw.choice(VALUES)}", *lines[line + 1 :]])
        elif kind == 6:
            text = "\n".join([*lines[:line], " " * draw.randint(1, 4) + lines[line], *lines[line + 1 :]])
        elif kind == 7:
            text += f"\n{draw.choice(FIELDS)}: {draw.choice(VALUES)}\n"
        else:
            text = text.replace(draw.choice("{}[]:,"), draw.choice("{}[]:, "), 1)
    return text


def arguments_of(command: object, draw: random.Random) -> list[str]:
    """A command line with odd fields, options and values."""
    words = []
    for _ in range(draw.randint(0, 3)):
        kind = draw.randrange(4)
        name = draw.choice(OPTIONS[command]) if kind == 0 else f"--{draw.choice(FIELDS)}"
        if kind == 1:
            at = draw.randrange(2, len(name))
            name = name[:at] + draw.choice(["", "-", ".", "x", "é", "--"]) + name[at + 1 :]
        if kind == 2:
            name = f"--{name.rpartition('.')[2].lstrip('-')}"
        value = draw.choice(VALUES)
        words += [f"{name}={value}"] if draw.random() < 0.3 else [name, value] if draw.random() < 0.9 else [name]
    return words


def refused(main, arguments: list[str], monkeypatch) -> str | None:
    """What a command says of its command line, or None where it accepts it. Any other exception ends the test."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        main()
    except UserError as error:
        return " ".join(str(error).split())
    return None


@pytest.mark.parametrize("part", range(4))
def test_configurations(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw, accepted = random.Random(part), 0
    for number in range(250):
        shipped = draw.randrange(len(CONFIGS))
        path = tmp_path / f"{number}.yaml"
        path.write_text(mutated(TEXTS[shipped], draw), encoding="utf-8", errors="surrogatepass")
        command = tune if CONFIGS[shipped].parent.name == "sweeps" else draw.choice([train, prepare, preview])
        told = refused(command.main, [str(path), "--print-config"], monkeypatch)
        printed = capsys.readouterr().out
        if told is None:
            accepted += 1
            if command is train:  # what is accepted means the same when it is read back
                path.write_text(printed)
                assert yaml.safe_load(printed) == load_config(str(path), []).model_dump(mode="json")
        else:
            assert f"{path}" in told
            assert len(told) < 1200
    assert 20 < accepted < 230


@pytest.mark.parametrize("part", range(4))
def test_command_lines(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw, accepted = random.Random(100 + part), 0
    for _ in range(250):
        command = draw.choice([train, train, train, tune, prepare, preview, evaluate, export])
        name = {tune: "sweeps/tail_skew_quick", evaluate: "nowhere", export: "nowhere"}.get(command, "quickstart")
        name = draw.choice(VALUES) if draw.random() < 0.1 else name
        arguments = [name, *arguments_of(command, draw)]
        if command not in (evaluate, export):
            arguments.append("--print-config")
        with contextlib.suppress(SystemExit):  # argparse's --help
            told = refused(command.main, arguments, monkeypatch)
            accepted += told is None
            assert told is None or 5 < len(told) < 1200
        capsys.readouterr()
    assert 10 < accepted < 200
