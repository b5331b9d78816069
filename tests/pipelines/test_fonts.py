"""Names in the letters of any script."""

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from pipelines.common.fonts import _families
from pipelines.prepare.pictures import save_histogram


def test_another_font_has_what_matplotlibs_own_lacks():
    own = get_font(findfont(FontProperties())).get_charmap()
    stix = next(entry for entry in fontManager.ttflist if entry.name == "STIXGeneral")  # matplotlib brings it
    letter = next(chr(code) for code in get_font(stix.fname).get_charmap() if code > 127 and code not in own)
    families, missing = _families({letter, "ä"})
    assert len(families) == 1
    assert not missing


def test_letters_of_no_font_are_told_of_in_one_line(tmp_path, caplog):
    none, counts = "\U00013000", np.array([30, 3])  # a hieroglyph
    if not _families({none})[1]:
        pytest.skip("a font of this machine has hieroglyphs")
    save_histogram(tmp_path / "a.png", [none, "Straße"], counts)  # matplotlib's own warnings would be errors here
    assert caplog.messages == [f"no installed font has {none}: boxes in a.png; install one (Debian: fonts-noto-cjk)"]
    caplog.clear()
    save_histogram(tmp_path / "b.png", ["дуб", "ясень"], counts)
    assert caplog.messages == []
