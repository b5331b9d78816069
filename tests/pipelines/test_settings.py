"""A configuration says what is wrong with it in one line, and names the nearest key."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import cibl_ray
from cibl_ray.config import RunConfig, build_config, load_config
from cibl_ray.config_warnings import config_warnings
from cibl_ray.training.schedules import lr_factor
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.sweep import base_content, load_sweep
from pipelines.common.config_file import read_config
from pipelines.common.errors import CommandParser, UserError
from pipelines.common.fields import models_in, types_in
from pipelines.common.settings import override, parse_overrides

REPOSITORY = Path(__file__).resolve().parents[2]
MOVING = "{start: 8, end: 24, shape: cosine, warmup: 8}"  # a cosine head's scale


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"x.yaml: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"):
        build_config({"optimizer": {"lrr": 0.1}}, [], "x.yaml")


def test_an_error_of_several_parts_names_the_place_of_the_field_that_it_is_about():
    with pytest.raises(UserError, match="^command line: train.epochs is 0"):
        load_config("quickstart", ["--epochs", "0"])
    with pytest.raises(UserError, match="^mine.yaml: train.epochs is 0"):
        build_config({"data": {"source": {"kind": "digits"}}, "train": {"epochs": 0}}, ["--seed", "1"], "mine.yaml")


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {each for field in model.model_fields.values() for each in models_in(field.annotation)}
    return {model}.union(*map(_models, inner))


def test_an_empty_path_is_refused_in_every_field(tmp_path):
    """It would be the working folder, and comes of a shell variable that is not set."""
    fields = [
        (model, name)
        for model in _models(RunConfig) | _models(SweepConfig)
        for name, field in model.model_fields.items()
        if Path in types_in(field.annotation)
    ]
    assert len(fields) > 20
    for model, name in fields:
        for empty in ("", " "):
            with pytest.raises(ValidationError) as refused:
                model.model_validate({name: empty})
            (error,) = refused.value.errors()
            assert (error["type"], error["ctx"]) == ("empty_path", {"field": name})
    message = r"data.source.path = '': names no file or folder; is a shell variable unset\?"
    with pytest.raises(UserError, match=f"command line: {message}"):
        load_config("photos", ["--data.source.path", ""])
    (tmp_path / "mine.yaml").write_text("data: {source: {kind: folder, path: ''}}\n")
    with pytest.raises(UserError, match=f"mine.yaml: {message}"):
        load_config(str(tmp_path / "mine.yaml"), [])
    with pytest.raises(UserError, match=message):
        base_content(load_sweep("sweeps/photos", ["--set.data.source.path", ""]))


def test_an_option_with_an_empty_path_is_refused():
    parser = CommandParser(prog="command")
    parser.add_argument("--out", type=Path)
    with pytest.raises(UserError, match=r"argument --out: '' names no file or folder; is a shell variable unset\?"):
        parser.parse_args(["--out", ""])


def test_a_folder_in_the_place_of_a_field_is_told_where_it_belongs(tmp_path):
    with pytest.raises(UserError, match=r"expected --field value; for the folder of your images: --data\.source\.path /"):
        load_config("photos", [str(tmp_path)])


@pytest.mark.parametrize("kind", [str, int, Path])
def test_two_dashes_are_no_value(kind):
    parser = CommandParser(prog="command")
    parser.add_argument("--out", type=kind)
    with pytest.raises(UserError, match="--out=--: '--' is no value"):
        parser.parse_args(["--out=--"])
    with pytest.raises(UserError, match="--out: expected one argument"):
        parser.parse_args(["--out", "--"])


def test_unknown_key_inside_a_union_is_named_as_written():
    with pytest.raises(UserError, match=r"unknown key 'loss.tail_skw'; did you mean 'loss.tail_skew'\?"):
        build_config({"loss": {"kind": "cibl", "tail_skw": 1}}, [], "x.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss.lambda", "1"], "unknown key 'loss.lambda'; this kind has: .*tail_skew"),
        (["--loss.bta", "1"], "unknown key 'loss.bta'; this kind has: "),  # `beta` is another kind's
        (["--loss.kind", "paco", "--loss.bta", "1"], r"unknown key 'loss.bta'; did you mean 'loss.beta'\?"),
        (["--loss.kind", "cross_entropy", "--loss.bta", "1"], "unknown key 'loss.bta'; this kind has no fields"),
        (["--head.scal", "1"], "unknown key 'network.head.scal'; this kind has: "),  # `scale` is another kind's
        (
            ["--head.kind", "cosine", "--head.scal", "1"],
            r"unknown key 'network.head.scal'; did you mean 'network.head.scale'\?",
        ),
        (["--head.kind", "cosine", "--head.scale", "{strt: 1}"], r"did you mean 'network.head.scale.start'\?"),
    ],
)
def test_only_what_the_kind_has_is_suggested(flags, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "bcl"], r"loss = 'bcl': write --loss.kind bcl, in a file loss: \{kind: bcl\}$"),
        (["--head", "cosine"], r"= 'cosine': write --network.head.kind cosine, in a file head: \{kind: cosine\}$"),
        (["--head", "conic"], r"network.head = 'conic': expected \{kind: ...\}, one of linear, cosine$"),
        (["--data.source", "[7]"], r"data.source = \[7\]: expected \{kind: ...\}, one of folder, lists, "),
        (["--data.views", "[{cut: crop}]"], r"data.views.0.cut = 'crop': write \{kind: crop\}$"),
        (["--data.views", "[{flip: 2}]"], r"data.views.0.flip = 2: .*less than or equal to 1$"),
        (["--data.views", "[{flip: 2}, {flip: 3}, {}]"], r" \(and 1 more\)$"),
    ],
)
def test_what_stands_where_a_kind_is_expected(flags, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", flags)


def test_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match=r"--epoch: unknown field; did you mean --train.epochs\?"):
        load_config("quickstart", ["--epoch", "3"])


def test_value_out_of_range_names_key_and_value():
    with pytest.raises(UserError, match=r"'?optimizer.lr'? = -1: .*greater than 0"):
        load_config("quickstart", ["--lr", "-1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.views", "[]"], "data.views"),
        (["--data.views.0.flip", "0"], r"data.views is a list; set it as a whole: --data.views '\[...\]'$"),
        (["--data.mean", "0.5"], r"data.mean = 0.5: expected a list, \[...\]$"),
        (["--head", f"{{kind: cosine, scale: {MOVING}}}", "--epochs", "8"], "scale.warmup = 8 .*--head.scale.warmup 0"),
        (["--head", "{kind: cosine, scale: {warmup: 2}}"], "warmup 2 would do nothing"),
        (["--head", "{kind: cosine, scale: {learnable: true, warmup: 2}}"], "warmup 2 would do nothing"),
        (["--backbone", "resnet50"], "data.size"),
        (["--loss.kind", "focal"], "loss.kind = 'focal': expected one of cross_entropy, .*, cibl$"),
        (["--data.views", "[{cut: {kind: croop}}]"], "data.views.0.cut.kind = 'croop': expected one of crop, resized, center$"),
        (["--data.source", "7"], "data.source"),
        (["--epochs"], "--epochs: a value is missing"),
        (["epochs", "3"], "expected --field value"),
        (["--kind", "x"], "say which one"),
    ],
)
def test_mistakes_are_one_line_errors(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config("quickstart", flags)
    assert "\n" not in str(caught.value)


def test_short_and_dotted_names_and_numbers():
    config = load_config("quickstart", ["--epochs", "7", "--optimizer.lr=1e-2", "--clip-norm", "2"])
    assert (config.train.epochs, config.optimizer.lr, config.optimizer.clip_norm) == (7, 0.01, 2.0)


@pytest.mark.parametrize("text", ["0", "007", "1e-3", "yes", "2024-05-06", "a: b", "[0-9]+", "#1"])
def test_a_field_of_text_takes_what_is_written(text):
    flags = ["--data.source.kind", "table", "--data.source.path", "1.csv"]
    for written in (text, f'"{text}"', f"'{text}'"):
        source = load_config("photos", [*flags, "--data.source.image", written]).data.source
        assert (source.image, source.path.name) == (text, "1.csv")
    assert load_config("photos", [*flags, "--data.source.image", "null"]).data.source.image is None


def test_only_the_kind_of_a_source_decides_what_is_a_path(tmp_path, monkeypatch):
    """A name on the hub is none; a folder is, beside the file or in the working folder."""
    (tmp_path / "conf" / "org" / "local").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "c.yaml"
    for content, path in (
        ("data: {source: {kind: huggingface, path: org/hub}}", "org/hub"),
        ("{data.source.path: org/hub, data.source.kind: huggingface}", "org/hub"),
        ("data: {source: {kind: huggingface, path: org/local}}", str(tmp_path / "conf" / "org" / "local")),
        ("data: {source: {kind: folder, path: org/hub}}", str(tmp_path / "conf" / "org" / "hub")),
        ("{data.source.kind: folder, data.source.path: org/hub}", str(tmp_path / "conf" / "org" / "hub")),
    ):
        file.write_text(content)
        assert str(load_config(str(file), []).data.source.path) == path
    flags = ["--data.source.kind", "huggingface", "--data.source.path"]
    assert load_config("photos", [*flags, "org/hub"]).data.source.path == "org/hub"
    source = load_config("photos", [*flags, "here"]).data.source
    assert source.path == str(tmp_path / "here")
    assert source.present()
    (tmp_path / "here").rmdir()
    assert not source.present()


def test_a_head_scale_that_moves_in_the_last_epoch():
    config = load_config("quickstart", ["--head", f"{{kind: cosine, scale: {MOVING}}}", "--epochs", "9"])
    assert config.network.head.scale.warmup == 8


def test_seed_zero_is_a_seed():
    assert load_config("quickstart", ["--seed", "0"]).seed == 0


def test_another_kind_drops_the_keys_of_the_old_one_in_either_order():
    for flags in (
        ["--data.source.kind", "folder", "--data.source.path", "x"],
        ["--data.source.path", "x", "--data.source.kind", "folder"],
    ):
        config = load_config("cifar10_lt", [*flags, "--loss.kind", "cross_entropy"])
        assert config.data.source.kind == "folder"
        assert config.loss.kind == "cross_entropy"


def test_a_whole_part_and_its_fields_mean_the_same_in_either_order():
    whole, field, kind = ["--loss", "{kind: bcl}"], ["--loss.kappa", ".5"], ["--loss.kind", "bcl"]
    for flags in ([*whole, *field], [*field, *whole], [*kind, *field], [*field, *kind], [*field, *kind, *whole]):
        assert load_config("quickstart", flags).loss.kappa == 0.5
    head, scale = ["--network", "{backbone: resnet20, head: {kind: cosine}}"], ["--head.scale", "{start: 30}"]
    for flags in ([*head, *scale], [*scale, *head], [*scale, "--head.kind", "cosine", "--backbone", "resnet20"]):
        network = load_config("quickstart", flags).network
        assert (network.backbone.title, network.head.scale.start) == ("resnet20", 30)
    # The last of two values counts.
    assert load_config("quickstart", [*field, *whole, "--loss.kappa", ".7", "--loss", "{kind: paco}"]).loss.kappa == 0.7


def test_a_kind_that_is_the_default_drops_nothing(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "{loss: {tail_skew: 0.2}, schedule: {warmup_epochs: 1}, data: {source: {kind: digits}, eval_cut: {ratio: 0.9}}}"
    )
    kinds = ["--loss.kind", "cibl", "--schedule.kind", "cosine", "--eval_cut.kind", "center"]
    config = load_config(str(tmp_path / "small.yaml"), kinds)
    assert (config.loss.tail_skew, config.schedule.warmup_epochs, config.data.eval_cut.ratio) == (0.2, 1, 0.9)
    assert load_config("quickstart", ["--loss", "{tail_skew: .3}", "--loss.kind", "cibl"]).loss.tail_skew == 0.3
    assert load_config(str(tmp_path / "small.yaml"), ["--loss.kind", "bcl"]).loss.kind == "bcl"


def test_override_leaves_the_original_alone():
    content = {"train": {"epochs": 1}}
    assert override(content, parse_overrides(["--epochs", "2"], RunConfig), RunConfig) == {"train": {"epochs": 2}}
    assert content == {"train": {"epochs": 1}}


def test_a_part_that_the_file_lacks_starts_from_its_default(tmp_path):
    (tmp_path / "small.yaml").write_text("{loss: {tail_skew: 0.2}, data: {source: {kind: digits}}}")
    config = load_config(str(tmp_path / "small.yaml"), ["--schedule.warmup_epochs", "1", "--eval_cut.ratio", ".9"])
    assert (config.loss.kind, config.loss.tail_skew) == ("cibl", 0.2)
    assert (config.schedule.kind, config.schedule.warmup_epochs) == ("cosine", 1)
    assert config.data.eval_cut.ratio == 0.9


def test_a_field_of_another_kind_says_so():
    with pytest.raises(UserError, match=r"'network.head.scale.*' belongs to another kind; set network.head.kind"):
        load_config("quickstart", ["--head.scale.start", "9"])


def test_unknown_key_in_a_list_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown key 'data.views.0.flp'; did you mean 'data.views.0.flip'\?"):
        build_config({"data": {"views": [{"flp": 1}]}}, [], "x.yaml")


def test_paths_are_taken_as_written():
    for name in ("2024", "2024-01-02", "no", "2024-13-45"):
        config = load_config("quickstart", ["--runs", name])
        assert config.runs.name == name


@pytest.mark.parametrize("flags", [["--lr", ".inf"], ["--loss.tail_skew", ".nan"], ["--lr", "2024-13-45"]])
def test_odd_values_are_refused(flags):
    with pytest.raises(UserError):
        load_config("quickstart", flags)


def test_unreadable_files(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, message in (("bad.yaml", "not valid YAML"), ("list.yaml", "mapping of keys"), ("none.yaml", "quickstart")):
        with pytest.raises(UserError, match=message):
            load_config(str(tmp_path / name), [])


def test_a_configuration_that_is_not_there_names_the_nearest():
    with pytest.raises(UserError, match=r"no configuration 'quickstrat'; did you mean quickstart\?") as caught:
        load_config("quickstrat", [])
    assert "cluster/" not in str(caught.value)  # those are no configurations of a run


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((REPOSITORY / "configs").rglob("*.yaml")) if path.parent.name not in ("sweeps", "cluster")],
    ids=lambda path: path.stem,
)
def test_shipped_configurations_are_valid(path):
    config = load_config(str(path.relative_to(REPOSITORY / "configs").with_suffix("")), [])
    assert config.data.prepared.is_absolute()
    # One to classify, two to contrast, unless a queue alone gives the pairs; BCL and ProCo classify one and contrast two more.
    of_queue = config.loss.needs.queue and config.loss.needs.momentum is None
    expected = 3 if config.loss.kind in ("bcl", "proco") else 2 if config.loss.needs.projection and not of_queue else 1
    assert len(config.data.views) == expected


def test_an_optional_path_can_be_unset():
    assert parse_overrides(["--data.source.val", "null"], RunConfig) == [("data.source.val", None)]
    assert parse_overrides(["--data.source.val", "1e3"], RunConfig) == [("data.source.val", "1e3")]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("data: {val_fraction: .1}\nseed: 1\ndata:\n  size: 8\n", 3, "data"),
        ("data:\n  val_fraction: .1\n  size: 8\n  val_fraction: .2\n", 4, "val_fraction"),
        ("data:\n  views:\n    - {kind: crop, kind: resize}\n", 3, "kind"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, line, key):
    """YAML keeps the last one: a configuration's data part would be dropped without a word."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_config(path)
    assert str(refused.value).startswith(f"{path}:{line}: '{key}' stands twice, first in line ")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\n", encoding="utf-8-sig")
    assert read_config(path) == {"seed": 3}


def test_a_warm_up_longer_than_the_run_is_shortened():
    """`--epochs 1` works as it stands, and says so. Resumed with more epochs, the run has its own warm-up."""
    config = load_config("quickstart", ["--epochs", "1"])
    assert config.schedule.warmup_epochs == 5
    assert config_warnings(config) == [
        "schedule.warmup_epochs = 5 is more than train.epochs = 1: the rate rises over 0.25 epochs"
    ]
    factors = [lr_factor(config.schedule, epoch, 1) for epoch in (0.125, 0.25, 0.625, 1.0)]
    assert factors == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert lr_factor(config.schedule, 2.5, 5) == 0.5
    assert config_warnings(load_config("quickstart", ["--epochs", "5"])) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--batch_size", "32"],
            "is 32 instead of 64, and optimizer.lr is still 0.1; by the linear rule: --lr 0.05",
        ),
        (["--batch_size", "512", "--optimizer.kind", "adamw"], "by the square-root rule: --lr 0.28"),
        (["--batch_size", "32", "--lr", "0.03"], ""),
        (["--batch_size", "64"], ""),
        (["--epochs", "9"], ""),
    ],
)
def test_a_batch_size_without_its_learning_rate_is_said(caplog, flags, says):
    load_config("quickstart", flags)
    assert says in caplog.text
    assert bool(says) == bool(caplog.text)
    caplog.clear()
    cibl_ray.load_config("quickstart", {"train.batch_size": 16})
    assert "by the linear rule: --lr 0.025" in caplog.text
