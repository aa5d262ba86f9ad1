"""The base job templates: the files are those of the source, and whatever a deployment asks for, the fences stay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prefect_docker.worker import DockerWorkerJobConfiguration, ImagePullPolicy

from flows.configuration_files import read_wanted
from flows.job_templates import FOLDER, TEMPLATES, TemplateName, job_template, main, template_text
from mover.errors import ConfigError

ROOT = Path(__file__).parent.parent
ENVIRON = {
    "RUNTIME_PROJECT": "archive",
    "RUNTIME_MEMORY": "3g",
    "RUNTIME_USER": "4242:4243",
    "RUNTIME_LTS_VOLUME": "archive_lts",
}
JOB = {
    "image": "registry.example.org/mover:1",
    "networks": ["runtime"],
    "volumes": ["scratch:/tmp/scratch"],
    "env": {"SCICAT_ENDPOINT": "http://scicat"},
}
GREEDY = {
    "privileged": True,
    "mem_limit": "1t",
    "auto_remove": False,
    "image_pull_policy": "Always",
    "network_mode": "host",
    "labels": {"com.docker.compose.project": "other"},
    "container_create_kwargs": {"user": "0:0", "cap_add": ["SYS_ADMIN"], "read_only": False, "mounts": []},
    "container_create_kwargs.user": "0:0",
    "user": "0:0",
    "job_configuration": {"privileged": True},
}


def _filled(name: TemplateName, environ: dict[str, str] | None = None) -> dict[str, Any]:
    """The template as ``flows.configure`` writes it."""
    path = str(ROOT / FOLDER / f"{name}.json")
    given = {"ARCHIVAL_BASE_JOB_TEMPLATE": path, **(ENVIRON if environ is None else environ)}
    template = read_wanted([], given, {}).pools["archival-docker-workpool"].base_job_template
    assert template is not None
    return dict(template)


async def _job(name: TemplateName, values: dict[str, Any]) -> DockerWorkerJobConfiguration:
    """What a worker makes of the template and a deployment's job variables; asks no server."""
    return await DockerWorkerJobConfiguration.from_template_and_values(_filled(name), values, client=object())


def test_the_files_are_what_the_source_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") == len(TEMPLATES)
    folder = ROOT / FOLDER
    assert {path.name for path in folder.iterdir()} == {f"{name}.json" for name in TEMPLATES}
    for name in TEMPLATES:
        written = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
        assert written == template_text(name) == (folder / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_variable_of_a_facility_is_filled_in_and_nothing_else_is_touched(name: TemplateName) -> None:
    text = template_text(name)
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(ENVIRON)
    for variable, value in ENVIRON.items():
        text = text.replace(f"${{{variable}}}", value)
    assert _filled(name) == json.loads(text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variable", ENVIRON)
@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_unset_variable_is_refused_with_its_name_and_the_file(
    name: TemplateName, variable: str, value: str | None
) -> None:
    environ = {key: text for key, text in {**ENVIRON, variable: value}.items() if text is not None}
    with pytest.raises(ConfigError, match=rf"{variable}=.*{name}\.json"):
        _filled(name, environ)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_placeholder_is_a_variable_and_every_variable_is_used(name: TemplateName) -> None:
    template = job_template(name)
    used = re.findall(r"\{\{\s*(\w+)\s*\}\}", json.dumps(template["job_configuration"]))
    properties = set(template["variables"]["properties"])
    assert set(used) | {"env"} == properties  # the worker merges the environment into the template's own
    assert set(template["variables"]["required"]) <= properties


@pytest.mark.anyio
@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_worker_understands_every_field(name: TemplateName) -> None:
    assert set(_filled(name)["job_configuration"]) <= set(DockerWorkerJobConfiguration.model_fields)
    job = await _job(name, JOB)
    assert job.image == JOB["image"]
    assert job.networks == ["runtime"]
    assert job.volumes == ["scratch:/tmp/scratch"]
    assert job.mem_limit == job.memswap_limit == "3g"
    assert job.env["SCICAT_ENDPOINT"] == "http://scicat"
    assert job.env["PREFECT_API_AUTH_STRING"] == ""
    assert job.auto_remove
    assert job.stream_output
    assert job.registry_credentials is None


@pytest.mark.anyio
async def test_an_image_of_a_release_is_pulled_once_and_one_for_development_never() -> None:
    policies = {name: (await _job(name, JOB))._determine_image_pull_policy() for name in TEMPLATES}  # noqa: SLF001
    assert policies == {"production": ImagePullPolicy.IF_NOT_PRESENT, "development": ImagePullPolicy.NEVER}


@pytest.mark.anyio
@pytest.mark.parametrize("name", TEMPLATES)
async def test_no_deployment_can_ask_for_more_than_the_template_gives(name: TemplateName) -> None:
    modest, greedy = await _job(name, JOB), await _job(name, {**JOB, **GREEDY})
    assert greedy.model_dump() == modest.model_dump()
    created = greedy.container_create_kwargs
    assert created is not None
    assert (created["user"], created["read_only"], created["cap_drop"]) == ("4242:4243", True, ["ALL"])
    assert created["security_opt"] == ["no-new-privileges:true"]
    assert not greedy.privileged
    assert not set(created) & set(DockerWorkerJobConfiguration.model_fields)  # the worker would drop them


@pytest.mark.anyio
async def test_the_secret_of_the_server_comes_from_a_file_whatever_the_worker_has_in_its_environment() -> None:
    job = await _job("production", JOB)
    assert job.env["PREFECT_API_AUTH_STRING_FILE"] == "/run/mover/prefectauth"
    assert job.env["PREFECT_API_AUTH_STRING"] == ""
