"""Columns in flat buffers are what lists of Python objects would be, in a fraction of their memory."""

import errno
import pickle
import tracemalloc

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.prepare.sources import Images, repeats
from pipelines.prepare.sources.addresses import Remote
from pipelines.prepare.sources.texts import Codes, Texts

WORDS = ["a/b.jpg", "", "grün/λ.png", "bad\udcff.png", "line\nfeed", "a/b.jpg"]


def test_texts_are_what_a_list_is():
    texts = Texts(WORDS)
    assert len(texts) == 6
    assert [*texts] == WORDS == texts[:]
    assert texts == WORDS
    assert texts == Texts(WORDS)
    assert texts != WORDS[:-1]
    assert texts != Texts(WORDS[:-1])
    assert [texts[row] for row in range(-6, 6)] == WORDS + WORDS
    assert texts[1:4] == WORDS[1:4]
    assert texts[::-2] == WORDS[::-2]
    assert "line\nfeed" in texts
    for row in (6, -7):
        with pytest.raises(IndexError):
            texts[row]
    texts.append("more")
    texts.extend(["and", "more"])
    assert texts[-3:] == ["more", "and", "more"]
    rows = np.array([3, 0, 0, 8])
    assert texts.take(rows) == ["bad\udcff.png", "a/b.jpg", "a/b.jpg", "more"]
    assert pickle.loads(pickle.dumps(texts)) == texts


def test_many_rows_come_in_blocks(monkeypatch):
    monkeypatch.setattr("pipelines.prepare.sources.texts._AT_ONCE", 7)
    many = [f"{row:x}" * (row % 5) for row in range(100)]
    texts = Texts(iter(many))
    assert texts == many
    order = np.random.default_rng(0).permutation(100)
    assert texts.take(order) == [many[row] for row in order]


def test_rows_beyond_the_limit_lie_in_a_file(monkeypatch):
    monkeypatch.setattr("pipelines.prepare.sources.texts._IN_MEMORY", 50)
    monkeypatch.setattr("pipelines.prepare.sources.texts._AT_ONCE", 7)
    many = [f"{row:x}" * (row % 5) for row in range(100)]
    texts = Texts(many)
    assert 0 < len(texts._buffer) <= 50 < len(texts._mapped)
    assert texts == many
    texts.extend(WORDS)
    texts.append("more")
    assert texts == [*many, *WORDS, "more"]
    assert texts.digests().tolist() == Texts().digests().tolist() + [
        row for each in texts for row in Texts([each]).digests().tolist()
    ]
    assert texts.take(np.array([105, 3, 102])) == ["a/b.jpg", "333", "grün/λ.png"]
    again = pickle.loads(pickle.dumps(texts))
    assert len(again._mapped) > 50
    again.append("last")
    assert again == [*texts, "last"]


def test_a_file_without_room_is_one_line(monkeypatch):
    class Full:
        def fileno(self):
            return -1

        def close(self):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipelines.prepare.sources.texts._IN_MEMORY", 50)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    with pytest.raises(UserError, match="cannot be written to a temporary file: No space left on device; set TMPDIR"):
        Texts(["a long name of an image"] * 3)


def test_the_same_rows_are_taken_once():
    texts = Texts(WORDS)
    images = Images(texts, np.arange(6), content=Remote(texts, below="https://example.org/"))
    some = images.take(np.array([4, 0]))
    assert isinstance(some.content, Remote)
    assert some.content._addresses is some.names
    assert some.content.place(1) == "https://example.org/a/b.jpg"
    rows = np.array([1])
    one = images.take(rows)
    rows[0] = 2
    assert images.take(rows).names == ["grün/λ.png"]
    assert one.names == [""]


def test_a_digest_does_not_depend_on_the_blocks(monkeypatch):
    class Content:
        def stamp(self):
            yield b"stamp"

    images = Images([f"image {row}" for row in range(50)], np.arange(50), content=Content())  # type: ignore[arg-type]
    whole = images.digest()
    monkeypatch.setattr("pipelines.prepare.sources.texts._AT_ONCE", 7)
    assert images.digest() == whole


@pytest.mark.parametrize("odd", [repeats._ODD, np.uint64(0)])  # with 0 all keys of the same second half look alike at first
def test_repeated_keys_are_those_of_a_dictionary(monkeypatch, odd):
    monkeypatch.setattr(repeats, "_ODD", odd)
    monkeypatch.setattr(repeats, "_AT_ONCE", 64)
    keys = np.random.default_rng(0).integers(0, 12, size=(300, 2)).astype(np.uint64)
    seen: dict[tuple[int, int], int] = {}
    expected = []
    for row, key in enumerate(map(tuple, keys.tolist())):
        first = seen.setdefault(key, row)
        if first != row:
            expected.append((first, row))
    assert [*repeats.repeated(keys)] == expected
    assert [*repeats.repeated(keys[:0])] == []


def test_digests_are_equal_for_equal_rows_alone():
    digests = [*map(tuple, Texts(WORDS).digests())]
    assert digests[0] == digests[5]
    assert len({*digests}) == 5
    assert Texts().digests().shape == (0, 2)


def test_codes_number_values_in_the_order_of_their_first_rows():
    codes = Codes(iter(["b", "a"]))
    codes.extend(["b", "c"])
    assert codes.values == ["b", "a", "c"]
    assert codes.codes.tolist() == [0, 1, 0, 2]
    assert codes.numbered({"a": 5, "b": 7}).tolist() == [7, 5, 7, -1]
    assert Codes().codes.tolist() == Codes().values == []


def test_memory_of_finding_repeats():
    """Beside the keys' 16 bytes a row, no more than that again."""
    keys = np.random.default_rng(0).integers(0, 1 << 62, size=(1 << 18, 2)).astype(np.uint64)
    tracemalloc.start()
    try:
        assert [*repeats.repeated(keys)] == []
        assert tracemalloc.get_traced_memory()[1] < 17 * len(keys)
    finally:
        tracemalloc.stop()


def test_memory_of_names():
    """Of 38 characters a name, at most 16 bytes more."""
    tracemalloc.start()
    try:
        texts = Texts(f"train/n{row % 100:08d}/n{row:017d}.jpg" for row in range(50_000))
        assert tracemalloc.get_traced_memory()[0] < 50_000 * 54
    finally:
        tracemalloc.stop()
    assert len(texts[0]) == 38
