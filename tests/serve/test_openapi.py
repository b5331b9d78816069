"""The OpenAPI document against the service: hundreds of requests made from it, each answer as it says."""

import re
import subprocess
import sys

import jsonschema_rs
import pytest

from tests.serve.conftest import serving


@pytest.fixture(scope="module", params=[False, True], ids=["open", "keys"])
def described(request, bundle):
    """(the document, headers that it asks for, the port)."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setenv("CIBL_RAY_API_KEYS", "secret")
        with serving([bundle], max_bytes=1 << 20, path_prefix="/models" if request.param else "") as server:
            document = server.ask("GET", f"{server.app.config.path_prefix}/openapi.json").json()
            yield document, server.port


def test_it_is_an_openapi_document(described):
    document, _ = described
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"200", "default"} <= set(operation["responses"]), (path, method)
            named = {part["name"] for part in operation.get("parameters", []) if part["in"] == "path"}
            assert named == {part.strip("{}") for part in path.split("/") if part.startswith("{")}, path
            for content in operation.get("requestBody", {}).get("content", {}).values():
                jsonschema_rs.validator_for(content["schema"])
    (top_k,) = [part for part in document["paths"]["/v1/predict"]["post"]["parameters"] if part["name"] == "top_k"]
    assert (top_k["schema"]["minimum"], top_k["schema"]["maximum"]) == (1, 1000)
    assert "application/json" in document["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]


def test_the_security_scheme_is_there_where_keys_are(described):
    document, _ = described
    schemes = document["components"].get("securitySchemes", {})
    assert set(schemes) == ({"key", "bearer"} if document["servers"] == [{"url": "/models"}] else set())
    assert document.get("security", []) == ([{"key": []}, {"bearer": []}] if schemes else [])
    assert document["paths"]["/v2/health/live"]["get"]["security"] == []


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance,missing_required_header,ignored_auth,"
    "negative_data_rejection"
)


def test_schemathesis_finds_no_failure(described, tmp_path):
    """Hundreds of requests made from the document, valid and not; each answer must be one that the document describes."""
    document, port = described
    statuses = [400, 401, 403, 404, 405, 406, 413, 415, 422]  # 413: more images than the document allows
    (tmp_path / "schemathesis.toml").write_text(f"[checks.negative_data_rejection]\nexpected-statuses = {statuses}\n")
    url = f"http://127.0.0.1:{port}{document['servers'][0]['url'].rstrip('/')}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", CHECKS, "--max-examples", "5", "--seed", "1"]
    command += ["--no-color", "--generation-database", "none", "-H", "x-api-key: secret"]
    command += ["--phases", "fuzzing" if "security" in document else "coverage,fuzzing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found is not None, done.stdout[-3000:]
    assert found[1] == found[2]
    assert int(found[1]) > (80 if "security" in document else 400)
