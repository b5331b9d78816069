"""`POST /v1/predict`: from image files to labels."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cibl_ray.bundle.card import LOGITS, MAX_SHIFT, PROBABILITIES
from pipelines.pixels import BadImageError
from serve.decode import Limits, UnsupportedImageError, announced, named, pixels, top
from serve.decoders import Decoders
from serve.engine import Spent
from serve.errors import ProblemError, bad_request, overloaded
from serve.json_body import LARGE, of_base64, parse_json
from serve.request import Request
from serve.settings import ReplicaConfig
from serve.store import Model
from serve.v2 import MAX_NUMBERS

T = TypeVar("T")

_SMALL = 16 << 10  # bytes of a file that is decoded in less time than handing it to a thread takes
_SMALL_PIXELS = 1 << 16
_FEW = 4  # files whose heads are read in the event loop
_LARGE_WORK = 16_000_000  # pixels, each as often as its decoder passes over it: an image of more is large
_ENTRY = 8  # numbers that take up as much of an answer as one class of `top`
_FILENAME = "an image's part needs a filename, as in curl -F image=@photo.jpg"
_PASSES = 15  # over as many pixels as a request may have: an ordinary progressive file has 10


class Options(BaseModel):
    """What a client may set: in the query, in fields of a form, or in JSON."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, max_length=128)
    top_k: int = Field(default=5, ge=1, le=1000)
    tail_shift: float = Field(default=0, ge=-MAX_SHIFT, le=MAX_SHIFT, allow_inf_nan=False)
    logits: bool = False
    precision: str | None = Field(default=None, max_length=8)


class _Json(Options):
    image: str | None = None
    images: list[str] | None = None


class Predict:
    """Reads requests, decodes their images within limits, and asks a model's engine."""

    def __init__(self, config: ReplicaConfig) -> None:
        """Make the threads that decode.

        Args:
            config: The limits.
        """
        self._config = config
        self._limits = Limits(min(config.max_pixels, config.max_request_pixels), config.formats)
        self._small = Limits(_SMALL_PIXELS, config.formats, max_scans=1)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="parse")
        self._usual, self._large = Decoders(2, "decode"), Decoders(1, "decode-large")

    async def read(self, request: Request, body: bytes) -> tuple[list[bytes], Options]:
        """Read the image files of a request, and its options.

        Args:
            request: The request.
            body: Its body, decompressed.

        Returns:
            The files, one at least, and the options.

        Raises:
            ProblemError: The body is not what its content type says, or too much.
        """
        kind = request.content_type.partition(";")[0].strip().lower()
        given: dict[str, Any] = dict(request.query)
        if kind == "multipart/form-data":
            form = _multipart(request.content_type, body, self._config.max_images)
            files, fields = await form if len(body) <= LARGE else await self.apart(body, lambda: asyncio.run(form))
            if not files and fields.keys() - Options.model_fields.keys():
                raise bad_request(f"no part of the form is an image: {_FILENAME}")
            known = {name: value for name, value in fields.items() if name in Options.model_fields}  # browsers send more
            return self._checked(files), _options(Options, {**given, **known})
        if kind in ("application/json", "text/json") or kind.endswith("+json"):
            return await self.apart(body, lambda: self._of_json(body, given))
        options = _options(Options, given)
        if named(body) is None:
            _check_type(kind, body)
        return self._checked([body]), options

    async def apart(self, body: bytes, work: Callable[[], T]) -> T:
        """Call `work`: in a thread if the body is large, so that others are answered meanwhile.

        Args:
            body: What is worked on.
            work: The call.

        Returns:
            Its result.
        """
        if len(body) <= LARGE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _of_json(self, body: bytes, given: dict[str, Any]) -> tuple[list[bytes], Options]:
        parsed = parse_json(body, self._config.max_images, self._config.max_images)
        images = parsed.get("images")
        if isinstance(images, list) and not all(isinstance(text, str) for text in images):
            raise bad_request("'images': every one must be a text, in base64")
        content = _options(_Json, {**given, **parsed})
        assert isinstance(content, _Json)
        if (content.image is None) == (content.images is None):
            raise bad_request("JSON needs one of 'image' and 'images', in base64")
        texts = content.images if content.images is not None else [content.image or ""]
        return self._checked([of_base64(text) for text in texts]), content

    def _checked(self, files: list[bytes]) -> list[bytes]:
        if not files or not all(files):
            raise bad_request("no image: send its bytes as the body, as files of a form, or as base64 in JSON")
        if len(files) > self._config.max_images:
            raise ProblemError(413, "too_many", f"{len(files)} images, {self._config.max_images} at most")
        return files

    async def answer(
        self, request: Request, model: Model, files: list[bytes], options: Options, spent: Spent
    ) -> list[dict[str, Any]]:
        """Classify image files.

        Args:
            request: Who asks.
            model: The model.
            files: The files.
            options: What the client asks for.
            spent: Gets the time of decoding and of the model.

        Returns:
            For each file its most likely classes under `top`, as `serve.decode.top` describes them. With `options.logits`, also
            the logits of all classes, from which the probabilities come.

        Raises:
            ProblemError: The precision is not loaded (400); a file is no image (415), damaged (422), too large (413 or 422), or
                too many wait (503); or the answer would be too large (413).
            GoneError: The client has closed the connection.
        """
        if options.precision is not None and options.precision not in model.engines:
            raise bad_request(f"'precision': this service has {', '.join(model.engines)}")
        engine = model.engine if options.precision is None else model.engines[options.precision]
        classes = len(model.bundle.card.classes)
        if options.logits and len(files) * classes > MAX_NUMBERS:
            most = max(1, MAX_NUMBERS // classes)
            raise ProblemError(413, "too_many", f"with logits {most} images at most; send them in parts, or leave logits out")
        if len(files) * _ENTRY * (k := min(options.top_k, classes)) > MAX_NUMBERS:
            most = max(1, MAX_NUMBERS // (_ENTRY * k))
            raise ProblemError(413, "too_many", f"with top_k {k} {most} images at most; send them in parts, or lower top_k")
        images = await self.pixels(request, model, files, spent)
        shift = np.full(len(images), options.tail_shift, np.float32) if options.tail_shift else None
        result = await engine.submit(images, shift, spent=spent)
        answers: list[dict[str, Any]] = [{"top": top(model.bundle.card, row, options.top_k)} for row in result[PROBABILITIES]]
        if options.logits:
            for answer, row in zip(answers, result[LOGITS].tolist(), strict=True):
                answer["logits"] = [round(value, 6) for value in row]
        return answers

    async def pixels(self, request: Request, model: Model, files: list[bytes], spent: Spent | None = None) -> np.ndarray:
        """Decode image files as evaluation did.

        Args:
            request: Who asks.
            model: Whose rule and size to follow.
            files: n of them.
            spent: Gets the time of decoding.

        Returns:
            uint8 (n, S, S, 3).

        Raises:
            ProblemError: As in `answer`.
            GoneError: As in `answer`.
        """
        rule = model.engine.runtime.card.rule
        spent = spent or Spent()

        def timed(file: bytes, limits: Limits) -> np.ndarray:
            begun = time.perf_counter()
            try:
                return pixels(file, rule, limits)
            finally:
                spent.decode.append(time.perf_counter() - begun)

        if len(files) == 1 and len(files[0]) <= _SMALL:
            try:
                return timed(files[0], self._small)[None]
            except BadImageError:  # perhaps of more pixels or scans than are decoded here
                pass
        work: list[asyncio.Future[Any]] = []
        try:
            # What decoding costs is known from the files' heads. A large image waits for large ones alone, one at a time.
            if sum(map(len, files)) <= LARGE and len(files) <= _FEW:
                costs = self._costs(files)
            else:
                costs = await asyncio.get_running_loop().run_in_executor(self._threads, self._costs, files)
            queues = [self._large if cost > _LARGE_WORK else self._usual for cost in costs]
            for own in {*queues}:
                more = sum(cost for cost, other in zip(costs, queues, strict=True) if other is own)
                if own.waiting and own.waiting + more > self._config.max_waiting_pixels:
                    raise overloaded(f"images of {own.waiting:,} pixels wait to be decoded; try again")
            calls = [functools.partial(timed, file, self._limits) for file in files]
            work += [own.submit(cost, call) for own, cost, call in zip(queues, costs, calls, strict=True)]
            return np.stack(await request.unless_gone(work))
        except UnsupportedImageError as error:
            raise ProblemError(415, "unsupported_image", str(error)) from error
        except BadImageError as error:
            raise ProblemError(422, "invalid_image", f"the image cannot be read: {error}") from error
        finally:
            for future in work:
                future.cancel()

    def _costs(self, files: list[bytes]) -> list[int]:
        """Pixels that a decoder goes over for each file. Raises ProblemError if it is too much; BadImageError."""
        most, total, costs = self._config.max_request_pixels, 0, []
        for file in files:
            size, passed = announced(file, self._limits)
            total += size
            costs.append(passed)
            if sum(costs) > _PASSES * most and len(files) > 1:
                raise ProblemError(
                    413, "too_large", f"the scans of the images go over more than {_PASSES * most:,} pixels; send them in parts"
                )
            if total > most:
                raise ProblemError(413, "too_large", f"the images have more than {most:,} pixels together; send them in parts")
        return costs

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._usual.close()
        self._large.close()


def _check_type(kind: str, body: bytes) -> None:
    """Raise ProblemError for a body that is plainly something else than an image, and say what its content type should be."""
    start = body[:256].lstrip()
    says = f"the body's Content-Type is {kind[:64]!r}, " if kind else "the body has no Content-Type, "
    if start.startswith((b"{", b"[")):
        raise ProblemError(415, "unsupported_type", f"{says}but it looks like JSON: send it as application/json")
    if start.startswith(b"--") and b"content-disposition" in body[:1024].lower():
        raise ProblemError(415, "unsupported_type", f"{says}but it looks like a form: send it as multipart/form-data")
    if kind == "application/x-www-form-urlencoded" and b"=" in body[:64] and start[:64].isascii():
        raise ProblemError(
            415,
            "unsupported_type",
            f"{says}which is not read here: send an image's bytes, multipart/form-data, or application/json",
        )


def _options(kind: type[Options], content: dict[str, Any]) -> Options:
    # pydantic would describe each key that it does not know, and each image of another type, at a kilobyte a piece.
    if (unknown := next((key for key in content if key not in kind.model_fields), None)) is not None:
        raise bad_request(f"{unknown[:64]!r}: not known; there are {', '.join(kind.model_fields)}")
    try:
        options = kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:64]
        value = content.get(str(first["loc"][0]))
        given = f" = {(value[:64] if isinstance(value, str) else value)!r}" if isinstance(value, str | int | float) else ""
        raise bad_request(f"{place}{given}: {first['msg']}") from error
    assert math.isfinite(options.tail_shift)
    return options


async def _multipart(content_type: str, body: bytes, max_files: int) -> tuple[list[bytes], dict[str, str]]:
    """(files, text fields) of a form."""
    from starlette.datastructures import Headers, UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    headers = Headers({"content-type": content_type})
    parser = MultiPartParser(headers, stream(), max_files=max_files, max_fields=16, max_part_size=4096)
    parser.spool_max_size = (
        len(body) + 1
    )  # never a temporary file: the body is in memory, and a container's root may be read-only
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        if "Too many files" in str(error):
            raise ProblemError(413, "too_many", f"more than {max_files} images; send them in parts") from error
        hint = f"; {_FILENAME}" if "maximum size" in str(error) else ""
        raise bad_request(f"the form cannot be read: {str(error).rstrip('.')}{hint}") from error
    files: list[bytes] = []
    fields: dict[str, str] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append(await value.read())
            else:
                fields[name] = value
    finally:
        await form.close()
    return files, fields
