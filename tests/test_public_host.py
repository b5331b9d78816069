"""What a repository on a public host needs: workflows, forms, the citation, the changelog, compose, each in its form."""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

import cibl_ray
from tests.conftest import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
# The schemas that come with check-jsonschema, and the files that must keep them.
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "dependabot": [GITHUB / "dependabot.yml"],
    "github-issue-forms": [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "citation-file-format": [REPOSITORY / "CITATION.cff"],
    "compose-spec": [REPOSITORY / "deploy" / "compose.yaml"],
}
YAMLLINT = """
extends: default
rules:
  braces: {max-spaces-inside: 0}
  comments: {min-spaces-from-content: 1}
  document-start: disable
  line-length: disable
  truthy: {check-keys: false}
"""


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_keep_the_hosts_schema(schema):
    pytest.importorskip("check_jsonschema", reason="needs the extra dev")
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml_is_clean():
    pytest.importorskip("yamllint", reason="needs the extra dev")
    tracked = subprocess.run(["git", "ls-files", "*.yml", "*.yaml", "*.cff"], cwd=REPOSITORY, capture_output=True, text=True)
    files = tracked.stdout.split()
    assert len(files) > 30
    done = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", YAMLLINT, *files], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_pinned_actions_with_few_permissions(path):
    """An action is named by its commit, which nobody can move; only publishing may ask for an identity."""
    text = path.read_text()
    uses = re.findall(r"uses: (.+)", text)
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())


def test_workflows_run_every_python_that_the_package_names():
    classifiers = (REPOSITORY / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', classifiers)
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]
    assert pythons == ["3.11", "3.12", "3.13"]
    for name in ("test", "install"):
        assert jobs[name]["strategy"]["matrix"]["python"] == pythons
    targets = {
        step["run"].split()[1] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make ")
    }
    assert targets == {"test", "docs"}


def changelog() -> list[tuple[str, str]]:
    """Each version with what stands after its number, newest first."""
    return re.findall(r"^## \[(.+?)\](.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_changelog_keeps_its_form():
    """Keep a Changelog: Unreleased first, then versions from the newest to the oldest, dated."""
    (first, nothing), *versions = changelog()
    assert (first, nothing) == ("Unreleased", "")
    numbers = [tuple(map(int, version.split("."))) for version, _ in versions]
    assert len(numbers) >= 2
    assert numbers == sorted(set(numbers), reverse=True)
    days = [date.fromisoformat(rest.removeprefix(" - ")) for _, rest in versions]
    assert days == sorted(days, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_version_stands_in_changelog_and_citation():
    version, rest = changelog()[1]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cibl_ray.__version__ == version == citation["version"]
    assert rest == f" - {citation['date-released']}"
    assert {reference["title"] for reference in citation["references"]} == {
        "Class Instance Balanced Learning for Long-Tailed Classification",
        "Contrastive Learning based Hybrid Networks for Long-Tailed Image Classification",
    }


def test_badges_are_of_this_package():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    badges = [line for line in lines[:6] if line.startswith("[![")]
    assert len(badges) >= 4
    workflow = Path(re.search(r"workflows/(\w+\.yml)/badge", badges[0])[1])
    assert (GITHUB / "workflows" / workflow).exists()
    assert all("pypi/" not in badge or "/cibl-ray" in badge for badge in badges)
