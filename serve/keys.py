"""The API keys of a service."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from pipelines.common.errors import UserError
from serve.errors import ProblemError
from serve.settings import ReplicaConfig, read_keys

log = logging.getLogger(__name__)


class Keys:
    """The keys that are accepted. False where none is asked for."""

    def __init__(self, config: ReplicaConfig) -> None:
        """Read the keys.

        Args:
            config: The settings.

        Raises:
            UserError: They cannot be read.
        """
        self._config = config
        self._digests, self._state = read_keys(config), _state(config.keys_file)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Let a request pass that has a key, or refuse it.

        Args:
            headers: Of the request, their names in lower case.

        Raises:
            ProblemError: Status 401.
        """
        if not self._digests:
            return
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        digest = hashlib.sha256(given).digest()
        found = [hmac.compare_digest(digest, key) for key in self._digests]  # all of them, each in constant time
        if True not in found:
            raise ProblemError(
                401,
                "unauthorized",
                "an API key is needed: x-api-key, or Authorization: Bearer",
                ((b"www-authenticate", b"Bearer"),),
            )

    async def watch(self) -> None:
        """Read the keys again whenever their file changes. A file without keys changes nothing."""
        while self._config.keys_file is not None:
            await asyncio.sleep(self._config.watch_seconds)
            state = await asyncio.to_thread(_state, self._config.keys_file)
            if state == self._state:
                continue
            self._state = state
            try:
                self._digests = await asyncio.to_thread(read_keys, self._config)
                log.warning("the API keys were read again: %d", len(self._digests))
            except UserError as error:
                log.error("the API keys stay as they were: %s", error)


def _state(path: Path | None) -> tuple[int, int, int] | None:
    """What differs after a file has changed; None where there is none."""
    try:
        stat = path.stat() if path is not None else None
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat is not None else None
