"""Several bundles, and new versions of them while requests are answered."""

import json
import shutil
import socket
import threading
import time

from cibl_ray.bundle.card import open_bundle
from serve import store
from tests.serve.conftest import encoded, serving, tensor, until


def test_several_models_and_a_swap_without_a_failed_request(bundle, versions, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(bundle, first)
    shutil.copytree(versions["other"], second)
    new = tmp_path / "new"
    shutil.copytree(versions["previous"], new)
    with serving([first, second], watch_seconds=0.1) as server:
        assert {model["name"] for model in server.ask("GET", "/v1/models").json()["models"]} == {"digits", "other"}
        assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 400  # which?
        answers, stop = [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(server.ask("POST", "/v1/predict?model=digits", encoded("PNG")))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        first.rename(tmp_path / "old")
        new.rename(first)
        wanted = open_bundle(first).models["fp32"].sha256
        until(lambda: answers[-1].json().get("sha256") == wanted)
        # A version that does not load is not taken up, and what was there goes on.
        shutil.copytree(first, tmp_path / "broken")
        (tmp_path / "broken" / "model.onnx").write_bytes(b"broken")
        first.rename(tmp_path / "good")
        (tmp_path / "broken").rename(first)
        until(
            lambda: next(m for m in server.ask("GET", "/v1/models").json()["models"] if m["name"] == "digits")["failed_update"]
        )
        time.sleep(0.2)
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status for answer in answers} == {200}
    assert {answer.json()["sha256"] for answer in answers} == {open_bundle(bundle).models["fp32"].sha256, wanted}


def test_a_failed_update_is_told_of_no_later_bundle(bundle, tmp_path):
    place, other = tmp_path / "place", tmp_path / "other"
    shutil.copytree(bundle, place)
    shutil.copytree(bundle, other)
    with serving([place], watch_seconds=0.1) as server:
        (place / "model.onnx").write_bytes(b"broken")
        until(lambda: server.ask("GET", "/v1/models").json()["models"][0]["failed_update"])
        server.run(server.app.store.set((other,)))
        assert server.ask("GET", "/v1/models").json()["models"][0]["failed_update"] is None


def test_a_bundle_of_another_name_takes_no_models_place(bundle, versions, tmp_path):
    place, new = tmp_path / "place", tmp_path / "new"
    shutil.copytree(bundle, place)
    shutil.copytree(versions["other"], new)
    with serving([place], watch_seconds=0.1) as server:
        place.rename(tmp_path / "old")
        new.rename(place)
        until(lambda: server.ask("GET", "/v1/models").json()["models"][0]["failed_update"])
        (model,) = server.ask("GET", "/v1/models").json()["models"]
        assert model["name"] == "digits"
        assert model["failed_update"].endswith(
            "has the name 'other'; export with --name digits, or restart the service to serve 'other' in its place"
        )
        assert server.ask("GET", "/v2/models/digits/ready").status == 200
        assert server.ask("POST", "/v1/predict?model=digits", encoded("PNG")).status == 200


def test_a_bundle_replaced_while_it_is_read_is_no_mixture(bundle, versions, tmp_path, monkeypatch):
    """Twice within a moment: the manifest was the second version's, the model that was then read the third's."""
    place, second, third = tmp_path / "place", tmp_path / "second", tmp_path / "third"
    shutil.copytree(bundle, place)
    shutil.copytree(versions["last"], second)
    shutil.copytree(versions["previous"], third)
    wanted = open_bundle(third).models["fp32"].sha256
    with serving([place], watch_seconds=0.1) as server:
        true, seen = store.Runtime, set()

        def late(path, *more):
            if third.exists():
                place.rename(tmp_path / "old 2")
                third.rename(place)
            return true(path, *more)

        monkeypatch.setattr(store, "Runtime", late)
        place.rename(tmp_path / "old 1")
        second.rename(place)

        def arrived() -> bool:
            model = server.app.store.models["digits"]
            seen.add((model.sha256, model.engine.runtime.card.source["checkpoint"]))
            return model.sha256 == wanted

        until(arrived)
        assert seen == {(open_bundle(bundle).models["fp32"].sha256, "best.safetensors"), (wanted, "previous.safetensors")}
        assert server.ask("GET", "/v1/models").json()["models"][0]["failed_update"] is None


def test_a_request_that_is_being_read_during_a_swap_is_answered(bundle, versions, tmp_path):
    place, new = tmp_path / "place", tmp_path / "new"
    shutil.copytree(bundle, place)
    shutil.copytree(versions["last"], new)
    before, after = (open_bundle(path).models["fp32"].sha256 for path in (place, new))
    body = json.dumps({"inputs": [tensor("images", [1, 16, 16, 3], "UINT8", [7] * 768)]}).encode()
    with serving([place], watch_seconds=0.05) as server:
        old = server.app.store.models["digits"].engine
        with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
            head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:100])
            until(lambda: server.app.load.open == 1)
            place.rename(tmp_path / "old")
            new.rename(place)
            until(lambda: server.app.store.models["digits"].sha256 == after)
            assert old.alive
            connection.sendall(body[100:])
            answer = connection.recv(65536)
            while before[:12].encode() not in answer and (more := connection.recv(65536)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert before[:12].encode() in answer
        until(lambda: not old.alive)  # nobody needs it any more
