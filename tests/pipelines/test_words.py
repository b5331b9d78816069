"""What is printed agrees with its number."""

import numpy as np
import pytest

from pipelines.common.words import agreed, plural
from pipelines.prepare.pictures import histogram_text


@pytest.mark.parametrize(
    ("count", "noun", "verb", "text"),
    [
        (1, "image", "are", "1 image is"),
        (0, "image", "are", "0 images are"),
        (1, "class", "have", "1 class has"),
        (2, "class", "have", "2 classes have"),
        (1, "image", "show", "1 image shows"),
        (1234, "copy", "", "1,234 copies"),
        (1, "copy", "", "1 copy"),
    ],
)
def test_a_number_its_noun_and_its_verb(count, noun, verb, text):
    assert plural(count, noun, verb) == text
    assert text.endswith(agreed(count, verb))


@pytest.mark.parametrize(
    ("classes", "last"), [(20, "c19"), (26, "(20 of 26 classes shown)"), (100, "(20 of 100 classes shown)")]
)
def test_the_histogram_says_how_many_classes_it_leaves_out(classes, last):
    text = histogram_text([f"c{number}" for number in range(classes)], np.arange(classes, 0, -1))
    assert text.splitlines()[-1].startswith(last)
