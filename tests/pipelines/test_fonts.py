"""Names in the letters of any script."""

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image, ImageDraw

from pipelines.common import fonts
from pipelines.common.fonts import Pen, find_fonts
from pipelines.prepare.pictures import save_histogram


def test_another_font_has_what_matplotlibs_own_lacks():
    own = get_font(findfont(FontProperties())).get_charmap()
    stix = next(entry for entry in fontManager.ttflist if entry.name == "STIXGeneral")  # matplotlib brings it
    letter = next(chr(code) for code in get_font(stix.fname).get_charmap() if code > 127 and code not in own)
    found, missing = find_fonts({letter, "ä"})
    assert len(found) == 1
    assert not missing


def test_lines_in_an_image_have_the_letters_of_any_script():
    """Each letter is drawn as its font has it: two different ones are not the same box."""
    stix = next(entry for entry in fontManager.ttflist if entry.name == "STIXGeneral")
    own = get_font(findfont(FontProperties())).get_charmap()
    first, second = [chr(code) for code in get_font(stix.fname).get_charmap() if code > 127 and code not in own][:2]
    lines = ["Дуб 7", "Eiche 7", first, second]
    pen, drawn = Pen(lines, 12, "views.png"), []
    for line in lines:
        image = Image.new("RGB", (80, 20), "white")
        pen.write(ImageDraw.Draw(image), (2, 2), line)
        drawn.append(np.asarray(image))
        assert drawn[-1].min() < 128
    assert not np.array_equal(drawn[2], drawn[3])


def test_letters_of_no_font_are_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fonts, "_said", set())
    none, counts = "\U00013000", np.array([30, 3])  # a hieroglyph
    if not find_fonts({none})[1]:
        pytest.skip("a font of this machine has hieroglyphs")
    save_histogram(tmp_path / "a.png", [none, "Straße"], counts)  # matplotlib's own warnings would be errors here
    assert caplog.messages == [f"no installed font has {none}: boxes in a.png; install one (Debian: fonts-noto-cjk)"]
    caplog.clear()
    save_histogram(tmp_path / "c.png", [none, "Straße"], counts)
    save_histogram(tmp_path / "b.png", ["дуб", "ясень"], counts)
    assert caplog.messages == []
