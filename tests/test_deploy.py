"""The manifests in deploy/: schemas of the operators, and Kubernetes' own schema for their pods."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from trimode.cli.commands import commands

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"
# A predictor's own fields; the others are a pod's.
EXTENSIONS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema's ValidationError."""
    schema = json.loads((DEPLOY / "schemas" / f"{manifest['kind'].lower()}.json").read_text(encoding="utf-8"))
    jsonschema.validate(manifest, schema)
    for template in pod_templates(manifest):
        labels = {"app": "trimode"}
        spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, **template}}
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] == "DynamoGraphDeployment":
        return [component["podTemplate"] for component in manifest["spec"]["components"]]
    predictor = manifest["spec"]["predictor"]
    return [{"spec": {name: value for name, value in predictor.items() if name not in EXTENSIONS}}]


def load(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return manifest


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_fit_their_schemas_and_say_that_they_were_not_run(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# NOT RUN.")
    check(load(path))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_misspelt_field_is_found(path: Path) -> None:
    manifest = load(path)
    for misspell in (_in_spec, _in_a_container):
        wrong = copy.deepcopy(manifest)
        misspell(wrong)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(wrong)


def _in_spec(manifest: dict[str, Any]) -> None:
    manifest["spec"]["componentes"] = []


def _in_a_container(manifest: dict[str, Any]) -> None:
    pod_templates(manifest)[-1]["spec"]["containers"][0]["volumeMount"] = []


def test_every_trimode_command_in_deploy_has_valid_options() -> None:
    """Of the manifests' containers and of the compose file."""
    lines: list[list[str]] = []
    for path in MANIFESTS:
        for template in pod_templates(load(path)):
            pod = template["spec"]
            lines += [
                [*one["command"], *one.get("args", ())] for one in pod["containers"] + pod.get("initContainers", [])
            ]
    compose = load(DEPLOY / "dynamo" / "compose.yaml")
    lines += [service["command"] for service in compose["services"].values()]
    used = [line[1:] for line in lines if line[0] == "trimode"]
    assert len(used) >= 5
    for name, *arguments in used:
        with click.Context(commands, info_name="trimode") as parent:
            command = commands.get_command(parent, name)
            assert command is not None
            command.make_context(name, arguments, parent)


def test_the_images_files_exist() -> None:
    text = (DEPLOY / "dynamo" / "Dockerfile").read_text(encoding="utf-8")
    copied = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("COPY ")]
    assert "scripts/serving/event_broker.py" in copied
    ignored = (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").split()
    assert all(path == "." or f"!{path}" in ignored for path in copied)
