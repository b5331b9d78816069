"""Text of any script in pictures: by the fonts that are installed, where matplotlib's own lacks the letters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry
    from PIL.ImageDraw import ImageDraw

log = logging.getLogger(__name__)

_said: set[str] = set()  # letters that no font has, which this process has said


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure. Letters that no installed font has are boxes, and said once."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families = [font.name for font in _fonts((text.get_text() for text in texts), path.name)]
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # one for each letter, each time that it is drawn
        figure.savefig(path, dpi=dpi)


class Pen:
    """Writes lines of text into a Pillow image.

    Args:
        texts: All lines that will be written. Letters that no installed font has are boxes, and said once.
        size: Height of the letters, in pixels.
        picture: The picture's name, for that line.
    """

    def __init__(self, texts: Iterable[str], size: int, picture: str) -> None:
        from matplotlib.font_manager import FontProperties, findfont
        from PIL import ImageFont

        files = [findfont(FontProperties()), *(font.fname for font in _fonts(texts, picture))]
        self._fonts = [(ImageFont.truetype(file, size), _letters(file)) for file in files]

    def write(self, draw: ImageDraw, place: tuple[int, int], text: str) -> None:
        """Write a line in black, its upper left corner at `place`: each part in the first font that has its letters."""
        left: float = place[0]
        for font, part in groupby(text, self._font_of):
            word = "".join(part)
            draw.text((left, place[1]), word, font=font, fill="black")
            left += draw.textlength(word, font=font)

    def _font_of(self, letter: str) -> Any:
        return next((font for font, letters in self._fonts if ord(letter) in letters), self._fonts[0][0])


def _fonts(texts: Iterable[str], picture: str) -> list[FontEntry]:
    """The fonts to take besides matplotlib's own. Says once which letters none has."""
    letters = {letter for text in texts for letter in text if ord(letter) > 127 and letter.isprintable()}
    if not letters:
        return []
    fonts, missing = find_fonts(letters)
    if new := missing - _said:
        _said.update(new)
        some = "".join(sorted(new)[:10])
        log.warning("no installed font has %s: boxes in %s; install one (Debian: fonts-noto-cjk)", some, picture)
    return fonts


def find_fonts(letters: set[str]) -> tuple[list[FontEntry], set[str]]:
    """Find fonts for letters.

    Args:
        letters: The letters.

    Returns:
        The fonts to take besides matplotlib's own, for those letters that it lacks; and the letters that none has.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    missing = {letter for letter in letters if ord(letter) not in _letters(findfont(FontProperties()))}
    fonts: list[FontEntry] = []
    real = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]  # matplotlib's own boxes
    for entry in sorted(real, key=lambda one: (one.style != "normal", str(one.weight) != "400", one.name)):
        if not missing:
            break
        try:
            known = _letters(entry.fname)
        except (OSError, RuntimeError):  # a font that was removed, or cannot be read
            continue
        found = {letter for letter in missing if ord(letter) in known}
        if found:
            fonts.append(entry)
            missing = missing - found
    return fonts, missing


def _letters(file: str) -> Any:
    """The letters that a font file has, by their numbers."""
    from matplotlib.font_manager import get_font

    return get_font(file).get_charmap()
