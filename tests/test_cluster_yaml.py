"""cluster.yaml: valid by Ray's own schema, of the versions that pyproject.toml names, and closed to the outside."""

import copy
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "15",
}
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement(project, name):
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == name)


def start_command(cluster, key):
    (command,) = [command for command in cluster[key] if "ray start" in command]
    return command


def test_it_is_valid_by_rays_schema(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_schema_would_notice_a_misspelt_key(cluster):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config({**copy.deepcopy(cluster), "max_wrokers": 8}))


def test_gpu_workers_scale_from_none_to_eight(cluster):
    worker = cluster["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], cluster["max_workers"]) == (0, 8, 8)
    assert worker["resources"]["GPU"] == 1
    assert "GPU" not in cluster["available_node_types"][cluster["head_node_type"]]["resources"]


@pytest.mark.parametrize("key", ["head_image", "worker_image"])
def test_images_agree_with_pyproject(cluster, project, key):
    ray_version, python = re.search(r":([\d.]+)-py(\d+)", cluster["docker"][key]).groups()
    assert ray_version in requirement(project, "ray").specifier
    assert f"{python[0]}.{python[1:]}" in SpecifierSet(project["requires-python"])


@pytest.mark.parametrize("key", ["head_setup_commands", "worker_setup_commands"])
def test_torch_agrees_with_pyproject(cluster, project, key):
    named = [name for command in cluster[key] for name in re.findall(r'"(torch[^"]+)"', command)]
    assert [Requirement(name) for name in named] == [requirement(project, "torch")]


@pytest.mark.parametrize("key", STARTS)
def test_the_environment_is_set_before_ray_starts(cluster, key):
    before = start_command(cluster, key).partition("ray start")[0]
    assert dict(re.findall(r"(\w+)=(\S+?)(?=[\s;])", before)) == ENVIRONMENT
    assert before.startswith("export ")


def test_no_port_of_ray_is_public(cluster):
    assert "--dashboard-host=127.0.0.1" in start_command(cluster, "head_start_ray_commands")
    assert "security_group" not in cluster["provider"]  # Ray's own lets in SSH alone
    assert not re.search(r"-p\b|--publish", " ".join(cluster["docker"]["run_options"]))
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_disks_are_encrypted_and_credentials_need_a_token(cluster):
    for node in cluster["available_node_types"].values():
        assert [disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"]] == [True]
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
