"""Numbers with their nouns and verbs, in what is printed."""

from __future__ import annotations

_ONE = {"are": "is", "were": "was", "have": "has"}


def plural(count: int, noun: str, verb: str = "") -> str:
    """A number with its noun, and the verb behind it: "1 image is", "1,200 images are", "2 classes".

    Args:
        count: How many.
        noun: Of one of them.
        verb: Of several; empty: none.
    """
    if count == 1:
        nouns = noun
    elif noun.endswith("y"):
        nouns = f"{noun[:-1]}ies"
    else:
        nouns = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {nouns} {agreed(count, verb)}".rstrip()


def agreed(count: int, verb: str) -> str:
    """A verb as the number asks.

    Args:
        count: How many.
        verb: Of several; empty: none.
    """
    return verb if count != 1 or not verb else _ONE.get(verb, f"{verb}s")
