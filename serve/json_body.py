"""What clients send as JSON: checked before it is parsed, because a value of two bytes may take a hundred in memory."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from serve.errors import ProblemError, bad_request

LARGE = 256 << 10  # bytes of a body that is read in a thread
_BASE64 = str.maketrans({"-": "+", "_": "/", "=": None, **dict.fromkeys(" \t\r\n")})
_MORE_VALUES = 1000  # of JSON, beside what its images need
_DEEPEST = 10  # lists that begin one in another: a tensor of images has four


def parse_json(text: bytes, values: int, texts: int = 0) -> dict[str, Any]:
    """Parse a client's JSON object.

    Args:
        text: The bytes.
        values: How many its images may need.
        texts: How many of those are strings.

    Returns:
        The object.

    Raises:
        ProblemError: It is not valid (400), or has more values than its images need (413).
    """
    most = values + _MORE_VALUES
    # Counted before it is parsed: a value of two bytes would take a hundred.
    if (count := text.count(b",")) > most:
        raise ProblemError(413, "too_many", f"JSON of {count:,} values, {most:,} at most")
    # json holds Python's lock from end to end, unless it calls Python: numbers in plenty must not hold up the event loop.
    calls: dict[str, Any] = {"parse_int": lambda digits: int(digits), "parse_float": lambda digits: float(digits)}
    if len(text) > LARGE:
        _check_large(text, texts)
    try:
        content = json.loads(text, parse_constant=_refuse, **(calls if len(text) > LARGE else {}))
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not valid JSON") from error
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_large(text: bytes, texts: int) -> None:
    """Raise ProblemError where a parser would make much of values at which it calls no Python: all but numbers."""
    if b"\0" in text:  # UTF-16 or 32, in which the counts below would find nothing
        raise bad_request("the body is not JSON in UTF-8")
    text = text.translate(None, b" \t\r\n")
    other = sum(text.count(word) for word in (b"[]", b"{}", b"true", b"false", b"null")) + text.count(b'"') // 2
    if other > texts + _MORE_VALUES:
        raise ProblemError(413, "too_many", f"JSON of {other:,} values that are no numbers, {texts + _MORE_VALUES:,} at most")
    # A pixel is a list of three numbers. With a row and an image around them there is still a list to two commas at most.
    if (lists := text.count(b"[")) > (most := text.count(b",") // 2 + _MORE_VALUES):
        raise ProblemError(413, "too_many", f"JSON of {lists:,} lists, {most:,} at most for so few numbers")
    if b"[" * _DEEPEST in text:
        raise bad_request(f"the body is not valid JSON for this service: lists in lists, {_DEEPEST} deep")


def of_base64(text: str) -> bytes:
    """Decode base64 as clients send it: also url-safe, with line breaks, without padding, or as a `data:` URL.

    Args:
        text: The text.

    Returns:
        The bytes.

    Raises:
        ProblemError: It is something else.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise bad_request("an image is a data: URL without ';base64,'; send base64")
    plain = text.translate(_BASE64)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        if text[:8].lower().startswith(("http://", "https://", "file:/", "s3://")):
            raise bad_request("an image is a URL; send its bytes, in base64") from error
        raise bad_request("an image is not valid base64") from error
