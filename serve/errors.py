"""What a client did wrong, or the service cannot do now: one JSON shape, that Triton's clients read too."""

from __future__ import annotations

import json


class ProblemError(Exception):
    """An answer that is an error. code: a word for programs; headers: of the response, lower case."""

    def __init__(self, status: int, code: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def body(self, request_id: str) -> bytes:
        """The answer's JSON."""
        return json.dumps({"error": self.message, "code": self.code, "request_id": request_id}).encode()


def bad_request(message: str) -> ProblemError:
    """Status 400: the request cannot be answered as it is."""
    return ProblemError(400, "invalid_request", message)


def overloaded(message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> ProblemError:
    """Status 503: the same request may succeed in a second."""
    return ProblemError(503, "overloaded", message, ((b"retry-after", b"1"), *headers))


def page(status: int, reason: str, code: str, message: str) -> bytes:
    """A whole HTTP response in the shape of all errors, for what is answered before the application."""
    body = json.dumps({"error": message, "code": code, "request_id": ""})
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
