"""docs/deploy: manifests that Kubernetes and KubeRay would take, of pyproject's versions, and closed but for Serve."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.serve.schema import ServeDeploySchema

from mvrec_core.reading import load_config
from serve.app import BuildArgs

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs" / "deploy"
RAY_FILES = ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml")
KUBERNETES = kubernetes_validate.latest_version()
IMAGE_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "15",
    "HF_HUB_OFFLINE": "1",
}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no other; `required` names those that it must have."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# The fields of KubeRay's ray.io/v1 that we use. Pod templates and the parts of pods are checked by Kubernetes' schema.
TEXT, WHOLE, FLAG, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "object"}
PARAMS = {"type": "object", "additionalProperties": TEXT}
CLUSTER = closed(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed("mode", mode={"enum": ["token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed("", idleTimeoutSeconds=WHOLE, resources=ANY, securityContext=ANY),
    headGroupSpec=closed("rayStartParams template", rayStartParams=PARAMS, template=ANY),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": closed(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=PARAMS,
            template=ANY,
        ),
    },
)
JOB = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode"]},
    backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=WHOLE,
    submitterPodTemplate=ANY,
    rayClusterSpec=CLUSTER,
)
SERVICE = closed("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=CLUSTER)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def schema(kind: str) -> dict[str, Any]:
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=closed("name", name={"type": "string", "pattern": "^[a-z][a-z0-9-]{0,40}$"}, labels=PARAMS),
        spec=SPECS[kind],
    )


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def templates(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a file, with its role."""
    (document,) = documents(name)
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]


PODS = [pytest.param(pod, role, id=f"{name}-{role}") for name in RAY_FILES for role, pod in templates(name)]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def requirement(project: dict[str, Any], name: str) -> Requirement:
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == name)


# the manifests


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_resources_have_the_fields_of_kuberay(name):
    (document,) = documents(name)
    jsonschema.validate(document, schema(document["kind"]))
    wrong = copy.deepcopy(document)
    cluster_of(wrong)["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong, schema(document["kind"]))


@pytest.mark.parametrize(("pod", "role"), PODS)
def test_pods_are_valid_by_kubernetes_schema(pod, role):
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod["metadata"]}, "spec": pod["spec"]}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    wrong = copy.deepcopy(whole)
    wrong["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["storage.yaml", "network.yaml"])
def test_plain_resources_are_valid_by_kubernetes_schema(name):
    for document in documents(name):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("pod", "role"), PODS)
def test_pods_keep_to_the_restricted_profile(pod, role):
    user = pod["spec"]["securityContext"]
    assert user["runAsNonRoot"] and user["runAsUser"] == 1000 and user["seccompProfile"]["type"] == "RuntimeDefault"
    for container in pod["spec"]["containers"]:
        locked = container["securityContext"]
        assert locked == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])


@pytest.mark.parametrize(("pod", "role"), PODS)
def test_pods_have_resources_probes_and_the_shared_volume(pod, role):
    (container,) = pod["spec"]["containers"]
    for resource in ("cpu", "memory"):
        assert container["resources"]["requests"][resource] and container["resources"]["limits"][resource]
    if role == "submitter":
        return
    assert container["livenessProbe"]["httpGet"] == {
        "head": {"path": "/api/gcs_healthz", "port": 8265},
    }.get(role, {"path": "/api/local_raylet_healthz", "port": 52365})
    assert container["readinessProbe"]["httpGet"]["port"] == {"head": 8265, "serve": 8000}.get(role, 52365)
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/data"]
    (volume,) = pod["spec"]["volumes"]
    (claim,) = documents("storage.yaml")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > 30  # Ray drains a node for as long


@pytest.mark.parametrize(("pod", "role"), PODS)
def test_no_port_but_serves_is_open_to_others(pod, role):
    inside, serve = documents("network.yaml")
    labels = pod["metadata"]["labels"]
    assert inside["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    own, operator = inside["spec"]["ingress"]
    assert own == {"from": [{"podSelector": inside["spec"]["podSelector"]}]}
    assert "kuberay-operator" in str(operator["from"])
    assert (serve["spec"]["podSelector"]["matchLabels"].items() <= labels.items()) == (role == "serve")
    assert [rule["ports"] for rule in serve["spec"]["ingress"]] == [[{"port": 8000}]]
    for container in pod["spec"]["containers"]:
        assert {port["containerPort"] for port in container.get("ports", [])} <= {8000}


# versions


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_and_images_agree_with_pyproject(name, project, dockerfile):
    text = (DEPLOY / name).read_text(encoding="utf-8")
    (version,) = set(re.findall(r'rayVersion: "(.+)"', text))
    assert version in requirement(project, "ray").specifier
    assert f"ARG RAY_VERSION={version}\n" in dockerfile
    assert set(re.findall(r"mvrec:([\d.]+)", text + dockerfile)) == {project["version"]}


def test_gpu_workers_alone_run_the_gpu_image():
    for name in RAY_FILES:
        for role, pod in templates(name):
            (container,) = pod["spec"]["containers"]
            limits = container["resources"]["limits"]
            assert container["image"].endswith("-gpu") == ("nvidia.com/gpu" in limits) == (role == "gpu")


def test_the_dockerfile_agrees_with_pyproject(project, dockerfile):
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim", dockerfile, re.MULTILINE)
    assert python in SpecifierSet(project["requires-python"])
    torch, ray = re.findall(r'"((?:torch|ray)[^"]+)"', dockerfile)
    assert Requirement(torch) == requirement(project, "torch")
    assert Requirement(ray.partition("==")[0]).extras == requirement(project, "ray").extras


def test_the_image_holds_the_packages_alone_and_no_root(project, dockerfile):
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)).split()
    assert {package.split(".")[0] for package in packages} == {path for path in copied if (ROOT / path).is_dir()}
    ignored, *allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert ignored == "*" and set(copied) == {path[1:] for path in allowed if path.startswith("!")}
    assert all((ROOT / path).exists() for path in copied)
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == ["1000:1000"]
    assert re.findall(r"^EXPOSE (.+)$", dockerfile, re.MULTILINE) == ["8000"]
    (environment,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)
    assert IMAGE_ENVIRONMENT.items() <= dict(re.findall(r"(\w+)=(\S+)", environment)).items()


# what they run


def test_the_service_deploys_our_application():
    (document,) = documents("rayservice.yaml")
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    example = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve" / "config.yaml").read_text("utf-8")))
    assert deployed.http_options == example.http_options and deployed.http_options.port == 8000
    ours, other = (config.applications[0] for config in (deployed, example))
    assert (ours.name, ours.route_prefix, ours.import_path) == (other.name, other.route_prefix, other.import_path)
    settings = BuildArgs.model_validate(ours.args)
    (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    room = group["replicas"] * int(container["resources"]["requests"]["cpu"])
    assert settings.threads * settings.max_replicas <= room  # Kubernetes adds no pods here


def test_the_job_trains_on_the_workers_that_it_gets():
    (document,) = documents("rayjob.yaml")
    python, dash, module, option, config, *overrides = document["spec"]["entrypoint"].split()
    assert (python, dash, module, option) == ("python", "-m", "pipelines.train", "--config")
    assert config.startswith("/data/") and "runs=/data/runs" in overrides
    settings = load_config(ROOT / "pipelines" / "configs" / "tiny.yaml", overrides).train
    (group,) = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert settings.workers == group["minReplicas"] == group["replicas"]
    assert settings.threads == int(container["resources"]["limits"]["cpu"])
    assert settings.device == "gpu"
