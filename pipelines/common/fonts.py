"""Pictures with text of any script: class names by the fonts that are installed, where matplotlib's own lacks their letters."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure. Letters that no installed font has become boxes, and one line warns of them."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    letters = {letter for text in texts for letter in text.get_text() if ord(letter) > 127 and letter.isprintable()}
    if letters:
        families, missing = _families(letters)
        for text in texts if families else ():
            text.set_fontfamily([*text.get_fontfamily(), *families])
        if missing:
            some = "".join(sorted(missing)[:10])
            log.warning("no installed font has %s: boxes in %s; install one (Debian: fonts-noto-cjk)", some, path.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # one for each letter, each time that it is drawn
        figure.savefig(path, dpi=dpi)


def _families(letters: set[str]) -> tuple[list[str], set[str]]:
    """Fonts to take besides matplotlib's own, for those of `letters` that it lacks; and what none has."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    missing = letters - _known(get_font(findfont(FontProperties())), letters)
    families: list[str] = []
    real = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]  # matplotlib's own boxes
    for entry in sorted(real, key=lambda one: (one.style != "normal", str(one.weight) != "400", one.name)):
        if not missing:
            break
        try:
            found = _known(get_font(entry.fname), missing)
        except (OSError, RuntimeError):  # a font that was removed, or cannot be read
            continue
        if found and entry.name not in families:
            families.append(entry.name)
            missing = missing - found
    return families, missing


def _known(font: Any, letters: set[str]) -> set[str]:
    charmap = font.get_charmap()
    return {letter for letter in letters if ord(letter) in charmap}
