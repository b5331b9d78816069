"""What a client did wrong, or the service cannot do now: one JSON shape, that Triton's clients read too."""

from __future__ import annotations

import json


class ProblemError(Exception):
    """An answer that is an error.

    Attributes:
        status: Of HTTP.
        code: A word for programs.
        message: A sentence for people.
        headers: More headers of the response, in lower case.
    """

    def __init__(self, status: int, code: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Make the answer.

        Args:
            status: Of HTTP.
            code: A word for programs.
            message: A sentence for people.
            headers: More headers of the response, in lower case.
        """
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def body(self, request_id: str) -> bytes:
        """Write the answer's JSON.

        Args:
            request_id: Of the request.

        Returns:
            The body.
        """
        return json.dumps({"error": self.message, "code": self.code, "request_id": request_id}).encode()


def bad_request(message: str) -> ProblemError:
    """Make an answer of status 400: the request cannot be answered as it is.

    Args:
        message: What is wrong, and what to do.

    Returns:
        The error, to be raised.
    """
    return ProblemError(400, "invalid_request", message)


def overloaded(message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> ProblemError:
    """Make an answer of status 503: the same request may succeed in a second.

    Args:
        message: What there is no room for.
        headers: More headers of the response.

    Returns:
        The error, to be raised.
    """
    return ProblemError(503, "overloaded", message, ((b"retry-after", b"1"), *headers))


def page(status: int, reason: str, code: str, message: str) -> bytes:
    """Write a whole HTTP response in the shape of all errors, for what is answered before the application.

    Args:
        status: Of HTTP.
        reason: The status in words.
        code: A word for programs.
        message: A sentence for people.

    Returns:
        The bytes of head and body.
    """
    body = json.dumps({"error": message, "code": code, "request_id": ""})
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
