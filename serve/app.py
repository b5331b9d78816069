"""The HTTP application of one replica: routes, keys, limits, metrics, access log.

Plain ASGI, so that a request costs little. Ray Serve, `serve.server` behind HAProxy, and `python -m serve --simple` all run it.
"""

from __future__ import annotations

import asyncio
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
from serve.engine import Result, Spent
from serve.errors import ProblemError, overloaded
from serve.keys import Keys
from serve.load import Held, Load
from serve.metrics import CONTENT_TYPE, Metrics
from serve.page.routes import Page
from serve.request import GoneError, Headers, Receive, Request, Scope, Send, after_body, client_of, respond
from serve.settings import ReplicaConfig
from serve.store import Model, Store
from serve.v1 import Predict

log = logging.getLogger(__name__)

_JSON: Headers = [(b"content-type", b"application/json")]
_V2_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/ready|/infer|/config|/stats)?")
_V1_FILE = re.compile(r"/v1/models/([^/]+)/([^/]+)")
_READS, _POSTS = b"GET, HEAD", b"POST"
_HEALTH = ("/v2/health/live", "/v2/health/ready")


class App:
    """An ASGI application. It answers 503 until `start` has been awaited, in the loop that serves.

    Attributes:
        store: The models.
        metrics: What Prometheus reads.
        load: The requests that are read, wait for a model, or are answered.
        stopping: While true, new requests get 503 and `Connection: close`. Set it before the listener closes.
    """

    def __init__(self, config: ReplicaConfig, names_requests: bool = True) -> None:
        """Make the application, without models.

        Args:
            config: The settings.
            names_requests: Whether answers carry their request's id. False where the proxy in front adds it.

        Raises:
            UserError: The keys cannot be read, or the access log cannot be written.
        """
        self.config, self._names_requests = config, names_requests
        self.metrics = Metrics()
        self.store = Store(config, self.metrics)
        self.stopping = False
        self._predict = Predict(config)
        self._access = AccessLog(config.access_log)
        self._keys = Keys(config)
        self._page = Page(config, bool(self._keys))
        self.load = Load(config, self.metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, bundles: tuple[Path, ...]) -> None:
        """Load the models, then look for new versions and new keys until `stop`.

        Args:
            bundles: The folders.

        Raises:
            UserError: A bundle cannot be used.
        """
        await self.store.set(bundles)
        self._tasks = [asyncio.create_task(self.store.watch()), asyncio.create_task(self._keys.watch())]

    async def stop(self) -> None:
        """Let go of models, threads and files."""
        for task in self._tasks:
            task.cancel()
        self.store.close()
        self._predict.close()
        self._access.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Args:
            scope: Of ASGI.
            receive: Of ASGI.
            send: Of ASGI.
        """
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        begun = time.perf_counter()
        request = Request(scope, receive)
        if request.unread:
            send = after_body(request, send, self.config.max_bytes, self.config.body_seconds)
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
            if self._access.open:
                request.client = client_of(scope, self.config.networks)
                self._access.write(request, route, status, seconds, facts)

    def _route(self, request: Request) -> tuple[str, Any]:
        """(name for the metrics, handler). Raises ProblemError."""
        path, method, prefix = request.path, request.method, self.config.path_prefix
        reads = method in ("GET", "HEAD")
        if prefix and path not in _HEALTH:  # what is in front of replicas asks for their health without it
            if path == prefix and reads:  # the page's links are relative to the path that ends in a slash
                return "page", self._to_the_page
            if not path.startswith(f"{prefix}/"):
                raise ProblemError(404, "not_found", f"no such path; {prefix}/docs lists them")
            path = path[len(prefix) :]
        if path == "/v2/health/live":
            return "live", self._allowed(self._live, reads, _READS)
        if path == "/v2/health/ready":
            return "ready", self._allowed(self._ready, reads, _READS)
        # A browser sends it without a key. Refused, it would hide the 503 that follows from the page that asks.
        if (allowed := preflight(request, self.config.cors)) is not None:
            return "preflight", self._preflight(allowed)
        if self.stopping:
            raise ProblemError(
                503,
                "stopping",
                "the service is ending; ask another one, or try again later",
                ((b"retry-after", b"1"), (b"connection", b"close")),
            )
        if (page := self._page.route(path)) is not None:
            return "page", self._allowed(page, reads, _READS)
        self._keys.check(request.headers)
        if path == "/v1/predict":
            return "predict", self._allowed(self._v1_predict, method == "POST", _POSTS)
        if path == "/v2/models/stats":
            return "stats", self._allowed(self._v2_stats, reads, _READS)
        if found := _V2_MODEL.fullmatch(path):
            request.model, request.version = found[1], found[2]
            match found[3]:
                case "/infer":
                    return "infer", self._allowed(self._v2_infer, method == "POST", _POSTS)
                case "/ready":
                    return "model_ready", self._allowed(self._v2_model_ready, reads, _READS)
                case "/config":
                    return "model_config", self._allowed(self._v2_model_config, reads, _READS)
                case "/stats":
                    return "model_stats", self._allowed(self._v2_stats, reads, _READS)
                case _:
                    return "model", self._allowed(self._v2_model, reads, _READS)
        if path == "/v2/repository/index":
            return "index", self._allowed(self._v2_index, method == "POST", _POSTS)
        if found := _V1_FILE.fullmatch(path):
            request.model, request.file = found[1], found[2]
            return "download", self._allowed(self._v1_file, reads, _READS)
        known = {"/metrics": self._metrics, "/v1/models": self._v1_models, "/v2": self._v2_server, "/v2/": self._v2_server}
        if path in known:
            return path.strip("/"), self._allowed(known[path], reads, _READS)
        raise ProblemError(404, "not_found", f"no such path; {prefix}/docs lists them")

    @staticmethod
    def _allowed(handler: Any, allowed: bool, methods: bytes) -> Any:
        if not allowed:
            raise ProblemError(405, "method_not_allowed", f"this path takes {methods.decode()}", ((b"allow", methods),))
        return handler

    def _model(self, name: str | None, version: str | None = None) -> Model:
        models = self.store.models
        if not models:
            raise _starting()
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

    async def _to_the_page(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        to = f"{request.path.rpartition('/')[2]}/"  # relative: a proxy in front may have put more before it
        await respond(send, 307, [(b"location", to.encode()), *common], b"")
        return 307, {}

    async def _v1_predict(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        with Held(self.load) as hold:
            body = await request.body(self.config.max_bytes, self.config.body_seconds, hold)
            with self.load.turn():
                files, options = await self._predict.read(request, body)
                model = self._model(options.model)
                hold(len(files) * 3 * model.bundle.card.rule.size**2)  # a body of kilobytes may be images of megabytes
                spent = Spent()
                answers = await self._predict.answer(request, model, files, options, spent)
            for answer in answers:
                self.metrics.answer(model.name, answer["top"][0]["label"])
            precision = options.precision or self.config.precision
            content = {
                "model": model.name,
                "precision": precision,
                "sha256": model.bundle.models[precision].sha256,
                "request_id": request.id,
                "predictions": answers,
            }
            headers = [*_JSON, (b"server-timing", spent.header()), *common]
            text = json.dumps(content).encode()
            hold(len(text))
            await respond(send, 200, headers, text)
        return 200, {"model": model.name, "images": len(files)}

    async def _v2_infer(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model, request.version)
        begun = time.perf_counter_ns()
        with Held(self.load) as hold:
            try:
                body = await request.body(self.config.max_bytes, self.config.body_seconds, hold)
                with self.load.turn():
                    inference, result = await self._infer(model, request, body, hold)
                headers, answer = inference.answer(result)
                hold(len(answer))
            except ProblemError:
                model.statistics.failed(time.perf_counter_ns() - begun)
                raise
            model.statistics.answered(len(inference.images), time.perf_counter_ns() - begun)
            for index in result["logits"].argmax(1).tolist():
                self.metrics.answer(model.name, model.bundle.card.classes[index])
            await respond(send, 200, [*headers, *common], answer)
        return 200, {"model": model.name, "images": len(inference.images)}

    async def _infer(self, model: Model, request: Request, body: bytes, hold: Held) -> tuple[v2.Inference, Result]:
        header_length, most = request.headers.get(v2.HEADER_LENGTH), self.config.max_images
        inference = await self._predict.apart(body, lambda: v2.Inference(model, body, header_length, most))
        if inference.files:
            hold(len(inference.files) * 3 * model.bundle.card.rule.size**2)
            inference.images = await self._predict.pixels(request, model, inference.files)
        return inference, await model.engine.submit(inference.images, inference.shift, inference.embedding)

    async def _v1_models(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        if not self.store.models:
            raise _starting()
        models = []
        at = f"{self.config.path_prefix}/v1/models"
        for name, model in self.store.models.items():
            card = model.bundle.card
            files = {
                precision: {"url": f"{at}/{name}/{precision}.onnx", "sha256": entry.sha256, "bytes": entry.bytes}
                for precision, entry in model.bundle.models.items()
            }
            models.append(
                {
                    "name": name,
                    "serves": self.config.precision,
                    "precisions": list(self.config.precisions),
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
        return await self._json(send, common, v2.SERVER)

    async def _v2_index(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        index = [{"name": name, "version": model.version, "state": "READY"} for name, model in self.store.models.items()]
        return await self._json(send, common, index)

    async def _v2_stats(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        models = self.store.models.values() if request.model is None else [self._model(request.model, request.version)]
        return await self._json(send, common, {"model_stats": [v2.statistics(model) for model in models]})

    async def _v2_model(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        return await self._json(send, common, v2.metadata(self._model(request.model, request.version)))

    async def _v2_model_config(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model, request.version)
        return await self._json(send, common, v2.configuration(model, self.config.max_images))

    async def _v2_model_ready(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        model = self._model(request.model, request.version)
        return await self._json(send, common, {"name": model.name, "ready": True})

    async def _live(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        return await self._json(send, common, {"live": True})

    async def _ready(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        # A model is in the store when it has answered an inference.
        ready = bool(self.store.models) and not self.stopping
        more: Headers = [] if ready else [(b"retry-after", b"1")]
        return await self._json(send, [*common, *more], {"ready": ready}, 200 if ready else 503)

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


def _starting() -> ProblemError:
    return overloaded("the service is starting; try again")
