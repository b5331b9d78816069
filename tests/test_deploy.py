"""Containers and Kubernetes: what the files name is there, and what they run is a command of this project."""

import json
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

from cibl_ray.config import load_config
from serve.__main__ import _parser
from serve.settings import KEYS, ServiceConfig
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HEALTH = {"/v2/health/live", "/v2/health/ready"}


def stages(name: str) -> list[list[tuple[str, str]]]:
    """A container file as its stages, each a list of (instruction, rest)."""
    text = "\n".join(line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#"))
    found: list[list[tuple[str, str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word:
            found[-1].append((word, " ".join(rest.split())))
    return found


def runs(stage: list[tuple[str, str]]) -> str:
    return "\n".join(rest for word, rest in stage if word == "RUN")


@pytest.mark.parametrize("name", ["serve.Dockerfile", "train.Dockerfile"])
def test_images_copy_what_the_context_lets_through(name):
    copied = {
        source
        for stage in stages(name)
        for word, rest in stage
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    ignore = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
    assert all((REPOSITORY / source).exists() for source in copied)
    # What the build of the wheel reads.
    assert copied >= {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "pipelines",
        "cibl_ray",
        "serve",
        "configs",
        "requirements.lock",
    }


def test_the_serving_image_has_no_torch_is_not_root_and_reports_its_health():
    build, final = stages("serve.Dockerfile")
    extra = dict(build)["ARG"].removeprefix("EXTRA=")
    assert '".[$EXTRA]"' in runs(build)
    names = {re.split(r"[\[<>= ]", requirement)[0] for requirement in EXTRAS[extra]}
    assert "onnxruntime" in names
    assert names.isdisjoint({"torch", "ray", "onnxruntime-gpu", "cibl-ray"})
    instructions = dict(final)
    assert instructions["USER"] == "10001"
    assert "--uid 10001" in runs(final)
    assert any(path in instructions["HEALTHCHECK"] for path in HEALTH)
    entry, command = json.loads(instructions["ENTRYPOINT"]), json.loads(instructions["CMD"])
    assert entry == ["python", "-m", "serve"]
    assert _parser().parse_args(command).simple
    assert f":{_parser().parse_args(command).port}/v2" in instructions["HEALTHCHECK"]


def test_the_cpu_build_of_the_service_needs_what_the_other_needs():
    other = [line for line in EXTRAS["serve-simple"] if not line.startswith("onnxruntime")]
    assert [line for line in EXTRAS["serve-cpu"] if not line.startswith("onnxruntime")] == other


def test_the_training_image_has_what_ffcv_compiles_with():
    (stage,) = stages("train.Dockerfile")
    setup = (REPOSITORY / "scripts" / "setup.sh").read_text()
    needed = re.findall(r'(?:missing="\$missing |venv=)([\w.+-]+)"?$', setup, re.MULTILINE)
    assert {"g++", "libopencv-dev", "libturbojpeg0-dev", "python3-venv"} <= set(needed)
    assert set(needed) <= set(runs(stage).split())
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', runs(stage))
    assert {"train", "ffcv", "cluster", "export"} <= set(extras.split(",")) <= set(EXTRAS)
    assert dict(stage)["USER"] == "10001"


def commands_of(script: str) -> list[list[str]]:
    return [shlex.split(found) for found in re.findall(r"python -m (cibl_ray\.\w+ .+)", script)]


def test_compose_trains_on_digits_and_serves_the_bundle_on_a_read_only_root():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert (DEPLOY.parent / service["build"]["dockerfile"]).exists()
    train, serve = services["train"], services["serve"]
    first, again, export = commands_of(train["command"][-1])
    assert first == ["cibl_ray.train", "quickstart", "--name", "digits"]
    assert load_config("quickstart", []).runs == Path("runs").absolute()
    assert again == ["cibl_ray.train", "--resume", "runs/digits"]
    assert export == ["cibl_ray.export", "runs/digits"]
    assert serve["depends_on"] == {"train": {"condition": "service_completed_successfully"}}
    arguments = _parser().parse_args(serve["command"])
    assert [path.as_posix() for path in arguments.bundles] == ["/data/runs/digits/bundle"]
    assert (arguments.host, serve["ports"]) == ("0.0.0.0", [f"127.0.0.1:{arguments.port}:{arguments.port}"])
    assert serve["read_only"]
    assert serve["volumes"] == ["data:/data:ro"]
    assert train["volumes"] == ["data:/data"]


def test_the_deployment_runs_the_service_with_few_rights():
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes/serve.yaml").read_text())
    assert [content["kind"] for content in (deployment, service)] == ["Deployment", "Service"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (container,) = pod["spec"]["containers"]
    arguments = _parser().parse_args(container["args"])
    (port,) = container["ports"]
    assert (arguments.port, arguments.simple) == (port["containerPort"], True)
    assert [entry["targetPort"] for entry in service["spec"]["ports"]] == [port["name"]]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {probe["path"] for probe in probes.values()} == HEALTH
    assert probes["liveness"]["path"] == "/v2/health/live"
    assert [entry["name"] for entry in container["env"]] == [KEYS]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_ray_service_runs_the_shipped_configuration():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's schema is written for an older pydantic
        from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((DEPLOY / "kubernetes/rayservice.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayService")
    serving = yaml.safe_load(content["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(serving)
    shipped = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())["applications"][0]
    (application,) = serving["applications"]
    assert application["import_path"] == shipped["import_path"]
    assert ServiceConfig.model_validate(application["args"]).max_replicas == shipped["args"]["max_replicas"]
    cluster = content["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}" in (REPOSITORY / "requirements.lock").read_text().splitlines()
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports["serve"] == schema.http_options.port
    for group in (head, *workers):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            (mount,) = container["volumeMounts"]
            assert mount["name"] in volumes
            assert application["args"]["bundles"] == [f"{mount['mountPath']}/NAME"]
