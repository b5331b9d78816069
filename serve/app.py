"""The HTTP application of one replica: routes, keys, limits, metrics, access log. Plain ASGI, so that a request costs
little."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from cibl_ray.bundle.card import MANIFEST
from serve import v2
from serve.access import AccessLog
from serve.cors import cors_headers, preflight
from serve.downloads import file_of, send_file
from serve.errors import ProblemError, overloaded
from serve.metrics import CONTENT_TYPE, Metrics
from serve.page.routes import Page
from serve.request import GoneError, Headers, Receive, Request, Scope, Send, respond
from serve.settings import ReplicaConfig, read_keys
from serve.store import Model, Store
from serve.v1 import Predict

log = logging.getLogger(__name__)

_JSON: Headers = [(b"content-type", b"application/json")]
_V2_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/ready|/infer)?")
_V1_FILE = re.compile(r"/v1/models/([^/]+)/([^/]+)")


class App:
    """An ASGI application. `start` must have been awaited, in the loop that serves."""

    def __init__(self, config: ReplicaConfig, names_requests: bool = True) -> None:
        """names_requests: answers carry their request's id; False where what is in front adds it."""
        self.config, self._names_requests = config, names_requests
        self.metrics = Metrics()
        self.store = Store(config, self.metrics)
        self._predict = Predict(config)
        self._access = AccessLog(config.access_log)
        self._keys = read_keys(config)
        self._page = Page(config, bool(self._keys))
        self._waiting = 0
        self._held = 0  # bytes of their bodies, and of images decoded from them
        self._watching: asyncio.Task[None] | None = None

    async def start(self, bundles: tuple[Path, ...]) -> None:
        """Load the models. Raises UserError."""
        await self.store.set(bundles)
        self._watching = asyncio.create_task(self.store.watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self.store.close()
        self._predict.close()
        self._access.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        begun = time.perf_counter()
        request = Request(scope, receive)
        route, status, facts = "unknown", 500, {}
        common: Headers = [(b"x-content-type-options", b"nosniff")]
        if self._names_requests:
            common.append((b"x-request-id", request.id.encode()))
        common += cors_headers(request, self.config.cors)
        try:
            route, handler = self._route(request)
            status, facts = await handler(request, send, common)
        except ProblemError as problem:
            status = problem.status
            await respond(send, status, [*_JSON, *common, *problem.headers], problem.body(request.id))
        except GoneError:
            status = 499
        except asyncio.CancelledError:  # how Ray Serve tells that the client has gone
            status = 499
            raise
        except Exception:
            log.exception("request %s failed", request.id)
            failure = ProblemError(500, "internal", "the service failed; its log has the cause under this request id")
            await respond(send, 500, [*_JSON, *common], failure.body(request.id))
        finally:
            seconds = time.perf_counter() - begun
            self.metrics.request(route, status, seconds)
            self._access.write(request, route, status, seconds, facts)

    def _route(self, request: Request) -> tuple[str, Any]:
        """(name for the metrics, handler). Raises ProblemError."""
        path, method = request.path, request.method
        if path == "/v2/health/live":
            return "live", self._live
        if path == "/v2/health/ready":
            return "ready", self._ready
        reads = method in ("GET", "HEAD")
        if (allowed := preflight(request, self.config.cors)) is not None:  # a browser sends it without a key
            return "preflight", self._preflight(allowed)
        if (page := self._page.route(path)) is not None:
            return "page", self._allowed(page, reads, b"GET, HEAD")
        self._check_key(request)
        if path == "/v1/predict":
            return "predict", self._allowed(self._v1_predict, method == "POST", b"POST")
        if found := _V2_MODEL.fullmatch(path):
            request.model, request.version = found[1], found[2]
            match found[3]:
                case "/infer":
                    return "infer", self._allowed(self._v2_infer, method == "POST", b"POST")
                case "/ready":
                    return "model_ready", self._allowed(self._v2_model_ready, reads, b"GET, HEAD")
                case _:
                    return "model", self._allowed(self._v2_model, reads, b"GET, HEAD")
        if found := _V1_FILE.fullmatch(path):
            request.model, request.file = found[1], found[2]
            return "download", self._allowed(self._v1_file, reads, b"GET, HEAD")
        known = {"/metrics": self._metrics, "/v1/models": self._v1_models, "/v2": self._v2_server, "/v2/": self._v2_server}
        if path in known:
            return path.strip("/"), self._allowed(known[path], reads, b"GET, HEAD")
        raise ProblemError(404, "not_found", "no such path; /docs lists them")

    @staticmethod
    def _allowed(handler: Any, allowed: bool, methods: bytes) -> Any:
        if not allowed:
            raise ProblemError(405, "method_not_allowed", f"this path takes {methods.decode()}", ((b"allow", methods),))
        return handler

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        given = request.headers.get(b"x-api-key") or request.headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        digest = hashlib.sha256(given).digest()
        found = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, each in constant time
        if True not in found:
            raise ProblemError(
                401,
                "unauthorized",
                "an API key is needed: x-api-key, or Authorization: Bearer",
                ((b"www-authenticate", b"Bearer"),),
            )

    def _model(self, name: str | None, version: str | None = None) -> Model:
        models = self.store.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise ProblemError(400, "invalid_request", f"say which model: {', '.join(models)}")
        if name not in models:
            raise ProblemError(404, "no_model", f"no such model; there are {', '.join(models)}")
        model = models[name]
        if version not in (None, model.version):
            raise ProblemError(404, "no_version", f"no such version of {name}; it is {model.version}")
        return model

    async def _v1_predict(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        with self._turn() as turn:
            files, options = await self._predict.read(request, turn.hold)
            model = self._model(options.model)
            turn.hold(len(files) * 3 * model.bundle.card.rule.size**2)  # a body of kilobytes may be images of megabytes
            answers = await self._predict.answer(model, files, options)
        for answer in answers:
            self.metrics.answer(model.name, answer["top"][0]["label"])
        content = {
            "model": model.name,
            "precision": self.config.precision,
            "sha256": model.sha256,
            "request_id": request.id,
            "predictions": answers,
        }
        await respond(send, 200, [*_JSON, *common], json.dumps(content).encode())
        return 200, {"model": model.name, "images": len(files)}

    async def _v2_infer(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model, request.version)
        with self._turn() as turn:
            body = await request.body(self.config.max_bytes, self.config.body_seconds, turn.hold)
            header_length = request.headers.get(v2.HEADER_LENGTH)
            most = self.config.max_images
            inference = await self._predict.apart(body, lambda: v2.Inference(model, body, header_length, most))
            result = await model.engine.submit(inference.images, inference.shift, inference.embedding)
        for index in result["logits"].argmax(1).tolist():
            self.metrics.answer(model.name, model.bundle.card.classes[index])
        headers, answer = inference.answer(result)
        await respond(send, 200, [*headers, *common], answer)
        return 200, {"model": model.name, "images": len(inference.images)}

    def _turn(self) -> _Turn:
        if self._waiting >= self.config.max_queue:
            raise overloaded(f"{self._waiting} requests are waiting; try again")
        return _Turn(self)

    def wait(self, change: int) -> None:
        self._waiting += change
        self.metrics.waiting(self._waiting)

    def hold(self, change: int, own: int) -> None:
        """Raises ProblemError where all requests would be more than a replica holds; one that is alone with its `own` never
        is."""
        if self._held > own and self._held + change > self.config.max_held_bytes:
            raise overloaded(f"requests of {self._held:,} bytes are waiting; try again", ((b"connection", b"close"),))
        self._held += change

    def release(self, change: int) -> None:
        self._held -= change

    async def _v1_models(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        models = []
        for name, model in self.store.models.items():
            card = model.bundle.card
            files = {
                precision: {"url": f"/v1/models/{name}/{precision}.onnx", "sha256": entry.sha256, "bytes": entry.bytes}
                for precision, entry in model.bundle.models.items()
            }
            models.append(
                {
                    "name": name,
                    "serves": self.config.precision,
                    "provider": model.engine.runtime.provider,
                    "classes": len(card.classes),
                    "files": files,
                    "accuracy": card.accuracy,
                    "failed_update": self.store.failed.get(name),
                }
            )
        return await self._json(send, common, {"models": models})

    async def _v1_file(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model)
        if request.file == MANIFEST:
            return await self._json(send, common, model.bundle.manifest)
        file, sha256 = file_of(model, request.file or "")
        return await send_file(request, send, file, sha256, common), {"model": model.name}

    async def _v2_server(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        return await self._json(send, common, {"name": "cibl-ray", "version": "2", "extensions": ["binary_tensor_data"]})

    async def _v2_model(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        return await self._json(send, common, v2.metadata(self._model(request.model, request.version)))

    async def _v2_model_ready(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model, request.version)
        return await self._json(send, common, {"name": model.name, "ready": True})

    async def _live(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        return await self._json(send, common, {"live": True})

    async def _ready(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        # A model is in the store when it has answered an inference.
        ready = bool(self.store.models)
        return await self._json(send, common, {"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        text = await asyncio.to_thread(self.metrics.text)
        await respond(send, 200, [(b"content-type", CONTENT_TYPE.encode()), *common], text)
        return 200, {}

    @staticmethod
    def _preflight(allowed: Headers) -> Any:
        async def handler(request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
            await send({"type": "http.response.start", "status": 204, "headers": [*allowed, *common]})
            await send({"type": "http.response.body", "body": b""})
            return 204, {}

        return handler

    @staticmethod
    async def _json(send: Send, common: Headers, content: Any, status: int = 200) -> tuple[int, dict[str, Any]]:
        await respond(send, status, [*_JSON, *common], json.dumps(content).encode())
        return status, {}


class _Turn:
    """A place among the requests that wait, and the bytes that it takes, given back however the request ends."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._held = 0

    def __enter__(self) -> _Turn:
        self._app.wait(1)
        return self

    def hold(self, more: int) -> None:
        """Raises ProblemError."""
        self._app.hold(more, self._held)
        self._held += more

    def __exit__(self, *error: object) -> None:
        self._app.wait(-1)
        self._app.release(self._held)
