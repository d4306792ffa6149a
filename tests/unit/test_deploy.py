"""ray_cluster.yaml, the `local` variant in docs/cluster.md, and the files in deploy/."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray._private.runtime_env.packaging as packaging
import ray.autoscaler._private.util as launcher
import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as rays_panels
import yaml
from jsonschema import ValidationError
from ray.serve.schema import ServeDeploySchema

from jobs.cli import job_parser, parsed_config
from pipeline.cluster.progress import GAUGES, TAGS
from pipeline.cluster.serve_model import Plan, serve_config
from pipeline.cluster.signals import WAIT_VARIABLE
from pipeline.serving.deployments import DRAIN_SECONDS, METRICS, Served

ROOT = Path(__file__).resolve().parents[2]
AWS = (ROOT / "ray_cluster.yaml").read_text()
[LOCAL] = re.findall(r"```yaml\n(cluster_name: .*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
BOTH = pytest.mark.parametrize("text", [AWS, LOCAL], ids=["aws", "local"])


def prepared(text: str) -> dict[str, Any]:
    return launcher.prepare_config(yaml.safe_load(text))


@BOTH
def test_the_launcher_accepts_the_cluster_and_refuses_a_mistyped_key(text: str) -> None:
    launcher.validate_config(prepared(text))
    with pytest.raises(ValidationError, match="idle_timeout"):
        launcher.validate_config(prepared(text) | {"idle_timeout": 5})


@BOTH
def test_every_start_has_token_authentication_and_no_dashboard_is_open(text: str) -> None:
    config = prepared(text)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
    [head] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert f"{WAIT_VARIABLE}=" in head, "or `ray job stop` kills before the next checkpoint"
    assert "0.0.0.0" not in text
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])


@BOTH
def test_nodes_are_set_up_from_the_lock_file(text: str) -> None:
    config = prepared(text)
    sent = [place for place in config["file_mounts"].values() if not place.startswith("~")]
    assert "requirements.lock" in sent
    assert all((ROOT / place).exists() for place in sent)
    assert any("scripts/setup.sh" in command for command in config["setup_commands"])


def test_the_head_on_aws_runs_no_training_and_workers_are_on_spot() -> None:
    config = prepared(AWS)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    for worker in types.values():
        assert 0 < worker["min_workers"] <= worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    # Without this group, the launcher opens SSH to everyone.
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in [head, *types.values()])


def test_a_jobs_package_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    packaging.create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True, excludes=[])
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        names = package.namelist()
    assert (tmp_path / "package.zip").stat().st_size < 2_000_000
    assert {name.split("/")[0] for name in names if "/" in name} == {"datasets", "pipeline", "benchmarks", "jobs"}
    tracked = [
        path for folder in ("datasets", "pipeline", "benchmarks", "jobs") for path in (ROOT / folder).rglob("*.*")
    ]
    assert {str(path.relative_to(ROOT)) for path in tracked if "__pycache__" not in path.parts} <= set(names)


# The fields that deploy/rayjob.yaml and rayservice.yaml use, from KubeRay's reference of ray.io/v1 (1.6.2), because no
# package ships the CRDs' schemas. Other fields are refused, so that a new field is looked up first.
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "terminationGracePeriodSeconds": {"type": "integer"},
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "image": {"type": "string"},
                            "env": {"type": "array", "items": {"properties": {"value": {"type": "string"}}}},
                            "ports": {"type": "array", "items": {"required": ["containerPort"]}},
                            "resources": {"additionalProperties": False, "properties": {"requests": {}, "limits": {}}},
                            "volumeMounts": {"type": "array", "items": {"required": ["name", "mountPath"]}},
                        },
                    },
                },
            },
        }
    },
}
START = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}},
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {
                "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                "rayStartParams": START,
                "template": POD,
            },
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": START,
                    "template": POD,
                },
            },
        },
    },
}


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one of KubeRay's resources."""
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        },
    }


RAY_JOB = resource(
    "RayJob",
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
            "entrypoint": {"type": "string"},
            "runtimeEnvYAML": {"type": "string"},
            "backoffLimit": COUNT,
            "shutdownAfterJobFinishes": {"type": "boolean"},
            "ttlSecondsAfterFinished": COUNT,
            "rayClusterSpec": CLUSTER,
        },
    },
)
RAY_SERVICE = resource(
    "RayService",
    {
        "type": "object",
        "required": ["serveConfigV2", "rayClusterConfig"],
        "additionalProperties": False,
        "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": CLUSTER},
    },
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def test_the_ray_job_has_fields_that_kuberay_knows(ray_job: dict[str, Any]) -> None:
    jsonschema.validate(ray_job, RAY_JOB)
    ray_job["spec"]["rayClusterSpec"]["authOption"] = {"mode": "token"}
    with pytest.raises(ValidationError, match="authOption"):
        jsonschema.validate(ray_job, RAY_JOB)


def test_the_ray_job_is_of_this_project(ray_job: dict[str, Any]) -> None:
    spec = ray_job["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    require_rays_version(cluster)
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "jobs.train"]
    config = parsed_config(job_parser("train", "").parse_args(words[3:]))
    [workers] = cluster["workerGroupSpecs"]
    assert config.cluster.num_workers == workers["replicas"] == workers["minReplicas"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    for pod in pods:
        mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert {"/shared", "/local"} <= mounted
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }


def require_rays_version(cluster: dict[str, Any]) -> None:
    required = re.search(r'"ray\[[a-z,]+\]==([0-9.]+)\.\*"', (ROOT / "pyproject.toml").read_text())
    assert required
    assert cluster["rayVersion"].rpartition(".")[0] == required[1]


def test_the_ray_service_is_of_this_project() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    jsonschema.validate(service, RAY_SERVICE)
    cluster = service["spec"]["rayClusterConfig"]
    require_rays_version(cluster)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (app,) = ServeDeploySchema.model_validate(config).applications
    served = Served.model_validate(app.args)
    plan = Plan(served, (), has_policies=True)
    assert serve_config(plan) == config | {"applications": [app.model_dump(exclude_unset=True)]}
    assert served.token_sha256, "a service that others can reach needs a token"
    [workers] = cluster["workerGroupSpecs"]
    [worker] = workers["template"]["spec"]["containers"]
    assert float(worker["resources"]["requests"]["cpu"]) * workers["replicas"] >= 2 * plan.num_cpus, (
        "room for a rollout"
    )
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > DRAIN_SECONDS


def test_every_metric_of_the_dashboard_is_ours_or_rays() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana_dashboard.json").read_text())
    panels = dashboard["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", [])
        for name in re.findall(r"\bray_\w+", target["expr"])
    }
    served = {name for name in asked if name.startswith("ray_drnet_serve_")}
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in served} == {f"ray_{name}" for name in METRICS}
    asked -= served
    ours = {f"ray_{name}" for name in GAUGES}
    panels_of_ray = Path(str(rays_panels.__file__)).parent.glob("*.py")
    rays = {name for file in panels_of_ray for name in re.findall(r"\bray_\w+", file.read_text())}
    assert ours <= asked, "each of our gauges is shown"
    assert asked - ours <= rays
    labels = {*TAGS, "resolution", "instance", "GpuIndex", "GpuDeviceName", "program", "deployment", "error_code"}
    for panel in panels:
        for target in panel.get("targets", []):
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    assert len({panel["id"] for panel in panels}) == len(panels)
