"""The files of deploy/ and .github/ agree with each other and the code. script/check-deploy checks their schemas."""

from __future__ import annotations

import os
import re

import yaml

from clip_gen.files import ROOT
from predict import Predictor

DEPLOY = ROOT / "deploy"
PROXY = (DEPLOY / "nginx.conf").read_text()
SERVER = ["python", "-m", "cog.server.http", "--host", "127.0.0.1"]
SETTINGS = re.compile(r"^env (\w+);", re.MULTILINE)


def test_the_manifest_starts_the_server_behind_the_proxy() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [door], [model] = pod["initContainers"], pod["containers"]
    [port] = door["ports"]
    assert f"listen {port['containerPort']};" in PROXY
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {variable["name"] for variable in door["env"]} <= set(SETTINGS.findall(PROXY))
    assert model["args"] == SERVER
    assert "ports" not in model
    mounted = {mount["name"] for container in (door, model) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_compose_starts_the_server_in_the_network_of_the_proxy() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services["model"]["command"] == SERVER
    assert services["model"]["network_mode"] == "service:door"
    assert "ports" not in services["model"]
    assert f"listen {services['door']['ports'][0].partition(':')[2]};" in PROXY
    assert set(services["door"]["environment"]) <= set(SETTINGS.findall(PROXY))


def test_the_proxy_names_every_setting_that_its_script_reads() -> None:
    script = (DEPLOY / "door.js").read_text()
    used = {*re.findall(r"process\.env\.(\w+)", script), *re.findall(r"'(DOOR_\w+)'", script)}
    assert used == set(SETTINGS.findall(PROXY))
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert all(f"`{name}" in page or name in page for name in used)


def test_a_prediction_may_last_as_long_behind_the_proxy_as_without_it() -> None:
    [seconds] = re.findall(r"proxy_read_timeout (\d+)s; # CLIP", PROXY)
    assert int(seconds) == 1800 + 60
    assert f"one replica for every {Predictor.run.__cog_concurrent_max__} waiting" in (
        ROOT / "docs" / "deploy.md"
    ).read_text().replace("\n  ", " ")


def test_the_workflows_run_scripts_that_exist() -> None:
    for path in (ROOT / ".github" / "workflows").iterdir():
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        for command in (step.get("run", "") for step in steps):
            for script in re.findall(r"\bscript/[\w-]+", command):
                assert os.access(ROOT / script, os.X_OK), script
            assert "${{" not in command, "a value of an expression is code there; pass it as a variable"
