"""The profiles' counts are the published ones, seeded, nested, and for training only."""

import json

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.config import CountsProfile, ExpProfile, ListProfile, StepProfile
from pipelines.prepare.longtail import apply_profile, carve, exp_counts
from pipelines.prepare.sources import Images, class_counts
from tests.conftest import archive


def balanced(classes: int, each: int) -> Images:
    labels = np.repeat(np.arange(classes), each)
    return Images([f"{i}" for i in range(len(labels))], labels, pixels=np.zeros((len(labels), 1, 1, 3), np.uint8))


def exp(imbalance: float, largest: int | None = None) -> ExpProfile:
    return ExpProfile(kind="exp", imbalance=imbalance, largest=largest)


@pytest.mark.parametrize(
    ("classes", "each", "imbalance", "total", "groups"),
    [
        (100, 500, 100, 10_847, (35, 35, 30)),
        (100, 500, 50, 12_608, (41, 41, 18)),
        (100, 500, 10, 19_573, (69, 31, 0)),
        (10, 5000, 100, 12_406, None),
        (10, 5000, 50, 13_996, None),
        (10, 5000, 10, 20_431, None),
    ],
)
def test_published_counts(classes, each, imbalance, total, groups):
    kept = apply_profile(exp(imbalance), balanced(classes, each), classes, seed=0)
    counts = class_counts(kept.labels, classes)
    assert counts.sum() == total
    assert counts.tolist() == exp_counts(classes, each, imbalance).tolist()
    if groups:
        assert ((counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()) == groups


def test_imagenet_lt_shape():
    path = archive("imagenet_lt_class_counts.json")
    kept = apply_profile(CountsProfile(kind="counts", path=path), balanced(1000, 1280), 1000, seed=0)
    counts = class_counts(kept.labels, 1000)
    assert (counts.sum(), counts.max(), counts.min()) == (115_846, 1280, 5)
    assert ((counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()) == (385, 479, 136)


def test_smaller_imbalance_contains_larger():
    images = balanced(10, 200)
    small, large = (set(apply_profile(exp(i), images, 10, seed=3).names) for i in (10, 100))
    assert large < small


def test_seeds_choose_different_images_of_equal_number():
    images = balanced(10, 200)
    zero, again, one = (apply_profile(exp(10), images, 10, seed=s) for s in (0, 0, 1))
    assert zero.names == again.names
    assert zero.names != one.names
    assert (class_counts(zero.labels, 10) == class_counts(one.labels, 10)).all()


def test_the_fields_subset_is_that_of_its_code():
    """np.random.seed(0), then a shuffle of each class's places in turn, as the code behind the published tables."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 50))
    images = Images([str(i) for i in range(500)], labels, pixels=np.zeros((500, 1, 1, 3), np.uint8))
    of_field = ExpProfile(kind="exp", imbalance=10, subset="field")
    state = np.random.get_state()
    np.random.seed(0)
    chosen = []
    for label, count in enumerate(exp_counts(10, 50, 10)):
        places = np.where(labels == label)[0]
        np.random.shuffle(places)
        chosen += places[:count].tolist()
    np.random.set_state(state)
    for seed in (0, 7):
        assert apply_profile(of_field, images, 10, seed=seed).names == [str(place) for place in sorted(chosen)]


def test_step_halves():
    counts = class_counts(apply_profile(StepProfile(kind="step", imbalance=10), balanced(5, 100), 5, seed=0).labels, 5)
    assert counts.tolist() == [100, 100, 10, 10, 10]


def test_largest_defaults_to_what_every_class_has():
    labels = np.repeat(np.arange(3), [7, 9, 8])
    images = Images([str(i) for i in range(24)], labels, pixels=np.zeros((24, 1, 1, 3), np.uint8))
    assert class_counts(apply_profile(exp(1), images, 3, seed=0).labels, 3).tolist() == [7, 7, 7]


def test_more_images_than_a_class_has():
    with pytest.raises(UserError, match=r"asks for 600 images of class 0, which has 500; lower data.profile.largest"):
        apply_profile(exp(10, largest=600), balanced(10, 500), 10, seed=0)


def test_a_class_left_without_images():
    with pytest.raises(UserError, match=r"leaves class 9 no image; lower data.profile.imbalance"):
        apply_profile(exp(60), balanced(10, 50), 10, seed=0)


def test_list_profile_keeps_what_it_names(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("3 0\n101 1\n")
    kept = apply_profile(ListProfile(kind="list", path=path), balanced(2, 100), 2, seed=0)
    assert kept.names == ["3", "101"]
    path.write_text("999 1\n")
    with pytest.raises(UserError, match="names '999'"):
        apply_profile(ListProfile(kind="list", path=path), balanced(2, 100), 2, seed=0)
    path.write_text("3 0\n101 1\n3 0\n")
    with pytest.raises(UserError, match="names '3' twice"):
        apply_profile(ListProfile(kind="list", path=path), balanced(2, 100), 2, seed=0)
    path.write_text("3 1\n")
    with pytest.raises(UserError, match="label 1, the source 0"):
        apply_profile(ListProfile(kind="list", path=path), balanced(2, 100), 2, seed=0)
    path.write_text("3 0\n5 0\n")
    with pytest.raises(UserError, match=r"list\.txt names no image of class 'oak'; each class needs one"):
        apply_profile(ListProfile(kind="list", path=path), balanced(2, 100), 2, 0, ["ash", "oak"])


@pytest.mark.parametrize("content", ["[1, 2]", "nonsense", '{"0": 1, "1": "x", "2": 3}'])
def test_bad_counts_files(tmp_path, content):
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"counts\.json"):
        apply_profile(CountsProfile(kind="counts", path=path), balanced(3, 9), 3, seed=0)


@pytest.mark.parametrize("count", [0, -3, 3_000_000_000, 10**400])
def test_counts_that_are_no_numbers_of_images(tmp_path, count):
    path = tmp_path / "counts.json"
    path.write_text(f"[4, {count}, 2]")
    with pytest.raises(UserError, match=r"counts\.json has the count .*; counts are numbers of images, from 1 on") as refused:
        apply_profile(CountsProfile(kind="counts", path=path), balanced(3, 9), 3, seed=0)
    assert len(str(refused.value)) < 300


def test_counts_file_as_mapping(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"0": 5, "1": 1}))
    kept = apply_profile(CountsProfile(kind="counts", path=path), balanced(2, 9), 2, seed=0)
    assert class_counts(kept.labels, 2).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("names", "content", "expected"),
    [
        (["oak", "ash"], {"ash": 1, "oak": 5}, [5, 1]),
        (["oak", "fa\u0308hre"], {"f\u00e4hre": 2, "oak": 5}, [5, 2]),
        (["oak", "ash"], {"1": 4, "0": 3}, [3, 4]),
        (["0", "1"], {"1": 4, "0": 3}, [3, 4]),
        (["1", "0"], {"1": 4, "0": 3}, "keys are class names and class indices of other classes"),
        (["oak", "ash"], {"ash": 1, "elm": 5}, "'elm' is not one of the classes"),
        (["oak", "ash"], {"ash": 1}, "has no count of class 'oak'"),
    ],
)
def test_counts_by_class_name(tmp_path, names, content, expected):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    profile = CountsProfile(kind="counts", path=path)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            apply_profile(profile, balanced(2, 9), 2, 0, names)
    else:
        assert class_counts(apply_profile(profile, balanced(2, 9), 2, 0, names).labels, 2).tolist() == expected


def test_validation_is_balanced_disjoint_and_independent_of_the_profile():
    images = balanced(10, 50)
    train, val = carve(images, 10, 0.2, seed=0)
    assert class_counts(val.labels, 10).tolist() == [10] * 10
    assert not set(train.names) & set(val.names)
    assert set(train.names) | set(val.names) == set(images.names)
    assert set(apply_profile(exp(10), train, 10, seed=0).names) <= set(train.names)


def test_validation_takes_at_least_one_and_leaves_one():
    labels = np.array([0, 0, 0, 1, 1, 2])
    images = Images(list("abcdef"), labels, pixels=np.zeros((6, 1, 1, 3), np.uint8))
    train, val = carve(images, 3, 0.1, seed=0)
    assert class_counts(val.labels, 3).tolist() == [1, 1, 0]
    assert class_counts(train.labels, 3).tolist() == [2, 1, 1]
