"""The command line explains itself: --help of every field, --print-config, errors with a way on, and never a traceback."""

import io
import os
import re
import subprocess
import sys

import pytest
import yaml

from cibl_ray import train, tune
from cibl_ray.config import RunConfig, load_config
from cibl_ray.tuning.config import SweepConfig
from pipelines import preview
from pipelines.common.config_file import find_config, read_content
from pipelines.common.errors import UserError, run_command
from pipelines.common.explain import explain
from pipelines.common.fields import known_keys
from pipelines.common.settings import parse_overrides
from pipelines.prepare import __main__ as prepare
from tests.conftest import REPOSITORY


def call(main, monkeypatch, *arguments):
    """A command within this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


@pytest.mark.parametrize(("model", "name"), [(RunConfig, "quickstart"), (SweepConfig, "sweeps/tail_skew")])
def test_help_lists_every_field(model, name):
    text = explain(model, read_content(find_config(name), model))
    listed = set(re.findall(r"^  (?:--)?([a-z_]+(?:\.[a-z_]+)*) ", text, re.MULTILINE))
    fields = known_keys(model)
    parts = {key for key in fields if any(other.startswith(f"{key}.") for other in fields) and key not in listed}
    assert listed | parts >= set(fields)


def test_help_shows_the_value_of_the_configuration_with_type_range_and_meaning(monkeypatch, capsys):
    call(train.main, monkeypatch, "cifar10_lt", "--loss.tail_skew", ".3", "--help")
    out = capsys.readouterr().out
    assert "--loss.tail_skew 0.3\n      Number, 0 to 1e+09. λ: 0 is cross-entropy; more moves accuracy to the tail." in out
    assert "--data.profile.imbalance 100\n      Number, at least 1, required." in out
    assert "--cluster " in out
    # Parts stand in the configuration's order, and the chosen kind comes before the others.
    headings = re.findall(r"^([a-z_.]+)(?: of kind (\w+))?(?:: |$)", out, re.MULTILINE)
    assert headings.index(("loss", "cibl")) < headings.index(("loss", "bcl")) < headings.index(("optimizer", ""))


def test_help_of_one_part(monkeypatch, capsys):
    call(train.main, monkeypatch, "--help", "loss")
    out = capsys.readouterr().out
    assert "--loss.tail_skew 0.05\n" in out
    assert "--optimizer.lr" not in out
    assert "--cluster" not in out
    call(train.main, monkeypatch, "--help", "lr")
    assert "--optimizer.lr 0.1\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--help los: no such part or field; did you mean --help loss\?"):
        call(train.main, monkeypatch, "--help", "los")


def test_help_without_a_configuration_names_the_options_and_the_shipped_ones(monkeypatch, capsys):
    call(train.main, monkeypatch, "--help")
    out = capsys.readouterr().out
    assert "--resume RUN" in out
    assert "recipes/imagenet_lt_90" in out
    assert "sweeps/" not in out
    call(tune.main, monkeypatch, "--help")
    assert "sweeps/tail_skew" in capsys.readouterr().out


@pytest.mark.parametrize("main", [prepare.main, preview.main])
def test_help_of_the_data(monkeypatch, capsys, main):
    call(main, monkeypatch, "quickstart", "--help", "data.profile")
    out = capsys.readouterr().out
    assert "--data.profile.imbalance 20\n" in out
    assert "--data.size" not in out


def test_print_config_reads_back_as_the_same(monkeypatch, capsys, tmp_path):
    call(train.main, monkeypatch, "cifar10_lt", "--epochs", "50", "--print-config")
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert load_config(str(tmp_path / "c.yaml"), []) == load_config("cifar10_lt", ["--epochs", "50"])
    call(tune.main, monkeypatch, "sweeps/tail_skew", "--trials", "3", "--print-config")
    assert yaml.safe_load(capsys.readouterr().out)["trials"] == 3
    call(prepare.main, monkeypatch, "quickstart", "--data.size", "20", "--print-config")
    assert yaml.safe_load(capsys.readouterr().out)["data"]["size"] == 20


def test_without_a_configuration_quickstart_trains_and_says_so(monkeypatch, capsys):
    call(train.main, monkeypatch, "--epochs", "7", "--print-config")
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["data"]["source"] == {"kind": "digits"}
    assert printed.err.startswith("no configuration named: training quickstart, ")
    with pytest.raises(UserError, match="--epoch: unknown field"):
        call(train.main, monkeypatch, "--cluster", "--epoch", "7")
    assert capsys.readouterr().err == ""


def test_a_configuration_without_a_source_is_refused(tmp_path):
    for text in ("seed: 1\n", "data: {size: 32}\n"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=r"c\.yaml: 'data\.source' is missing: .*kind: folder, path: FOLDER"):
            load_config(str(tmp_path / "c.yaml"), [])
    config = load_config(str(tmp_path / "c.yaml"), ["--data.source", "{kind: folder, path: here}"])
    assert config.data.source.path.name == "here"


def test_every_suggestion_of_an_ambiguous_field_works():
    keys = known_keys(RunConfig)
    tried = 0
    for leaf in sorted({key.rpartition(".")[2] for key in keys}):
        try:
            parse_overrides([f"--{leaf}", "1"], RunConfig)
        except UserError as error:
            text = str(error).partition(": ")[2]
            for help_, key in re.findall(r"--(help )?([a-z_.]+[a-z_])", text):
                tried += 1
                if help_:
                    assert explain(RunConfig, {}, key)
                else:
                    assert parse_overrides([f"--{key}", "1"], RunConfig)[0][0] == key
    assert tried > 30


@pytest.mark.parametrize(
    ("flag", "key"),
    [("learning_rate", "optimizer.lr"), ("learning-rate", "optimizer.lr"), ("batchsize", "train.batch_size"),
     ("weight-decy", "optimizer.weight_decay"), ("epoch", "train.epochs"), ("tail_skw", "loss.tail_skew")],
)  # fmt: skip
def test_a_misspelt_field_names_the_one_that_is_meant(flag, key):
    with pytest.raises(UserError, match=rf"--{flag}: unknown field; did you mean --{key}\?$"):
        load_config("quickstart", [f"--{flag}", "1"])


def test_an_error_of_the_command_line_names_the_field_alone():
    with pytest.raises(UserError, match=r"^command line: optimizer\.lr = -1: "):
        load_config("quickstart", ["--epochs", "20", "--lr", "-1", "--data.size", "20"])


def test_dotted_keys_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data.source: {kind: digits}\ntrain.epochs: 30\ntrain: {batch_size: 8}\nloss.tail_skew: .2\n"
    )
    config = load_config(str(tmp_path / "c.yaml"), [])
    assert (config.train.epochs, config.train.batch_size, config.loss.tail_skew) == (30, 8, 0.2)
    (tmp_path / "c.yaml").write_text("data: {source: {kind: digits}}\ntrain.epochs: 3\ntrain: {epochs: 4}\n")
    with pytest.raises(UserError, match=r"c\.yaml: 'train\.epochs' is given twice, dotted and nested; remove one"):
        load_config(str(tmp_path / "c.yaml"), [])


def test_a_relative_path_in_a_file_is_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "c.yaml").write_text("data: {source: {kind: folder, path: images}, prepared: /else}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("there/c.yaml", ["--runs", "out"])
    assert config.data.source.path == tmp_path / "there" / "images"
    assert str(config.data.prepared) == "/else"
    assert config.runs == tmp_path / "out"  # the command line's are relative to the working folder, as anywhere
    assert load_config("folder", []).data.source.path == tmp_path / "data" / "images"  # and so are the shipped ones'


def _boom():
    raise IndexError("no such thing\nat all")


def test_an_exception_nobody_foresaw_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_command(_boom)
    line = capsys.readouterr().err
    assert ended.value.code == 1
    assert line.count("\n") == 1
    assert line.startswith("error: unexpected IndexError: no such thing at all; the full trace is in ")
    (kept,) = tmp_path.iterdir()
    assert str(kept) in line
    assert "in _boom" in kept.read_text()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_unicode(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: print("λ = 0.05"))
    assert ended.value.code == 0
    assert out.buffer.getvalue() == b"\\u03bb = 0.05\n"  # type: ignore[attr-defined]


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m pipelines.prepare quickstart --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "typed", "offered"),
    [
        ("cibl_ray.train", "quick", {"quickstart"}),
        ("cibl_ray.train", "quickstart --loss.temp", {"--loss.temperature"}),
        ("cibl_ray.train", "quickstart --optimizer.kind ", {"sgd", "adamw"}),
        ("cibl_ray.train", "quickstart --train.compile ", {"auto", "true", "false"}),
        ("cibl_ray.train", "quickstart --max-f", {"--max-failures"}),
        ("cibl_ray.tune", "sweeps/tail_skew_", {"sweeps/tail_skew_quick"}),
        ("pipelines.prepare", "quickstart --data.source.pa", {"--data.source.path"}),
        ("cibl_ray.evaluate", "--tail", {"--tail-shift"}),
    ],
)
def test_a_shell_completes_names_fields_and_values(module, typed, offered, tmp_path):
    """As argcomplete's shell function asks. It reads the marker at the head of the module."""
    line = f"python -m {module} {typed}"
    asked = {"_ARGCOMPLETE": "3", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_TYPE": "9"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    subprocess.run([sys.executable, "-m", module], env={**os.environ, **asked}, cwd=REPOSITORY, check=True)
    assert set((tmp_path / "answer").read_text().split()) == offered
    source = REPOSITORY.joinpath(*module.split("."))
    head = (source / "__main__.py" if source.is_dir() else source.with_suffix(".py")).read_text()[:1024]
    assert "PYTHON_ARGCOMPLETE_OK" in head
