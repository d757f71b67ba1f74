"""What the container files name exists: settings, commands, folders, metrics, and the order of services."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from api.cli import app
from api.monitoring import Metrics
from api.service_settings import ServiceSettings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yml").read_text()
NGINX = (ROOT / "docker" / "nginx.conf").read_text()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    definitions: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
    return definitions


def test_variables_are_settings() -> None:
    names = set(re.findall(r"LINEUP_[A-Z_]+(?=[=:] )|LINEUP_[A-Z_]+(?==)", DOCKERFILE))
    names |= set(re.findall(r"^ +(LINEUP_[A-Z_]+):", COMPOSE, re.MULTILINE))
    assert "LINEUP_DATABASE_URL" in names
    assert {name.removeprefix("LINEUP_").lower() for name in names} <= set(ServiceSettings.model_fields)


def test_copied_paths_exist_and_reach_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    paths = {path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()}
    assert {"trainer", "indexer", "api", "migrations", "pyproject.toml", "requirements.lock"} <= paths
    assert {path for path in paths if f"!{path}" not in ignored} == set()
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_every_copied_package_is_installed_and_every_target_exists(services: dict[str, Any]) -> None:
    assert set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)) == {"base", "lean", "cpu", "cuda"}
    assert services["api"]["build"]["target"] == "${LINEUP_TARGET:-lean}"
    assert (ROOT / "docker" / services["api"]["build"]["context"] / services["api"]["build"]["dockerfile"]).exists()


def requirements(image: str) -> list[str]:
    """What a stage of the Dockerfile asks pip for."""
    stage = re.split(r"^FROM ", DOCKERFILE.split(f" AS {image}\n")[1], flags=re.MULTILINE)[0]
    [extras] = re.findall(r"python extras\.py (.*?) >", stage)
    command = [sys.executable, "docker/extras.py", *extras.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_lean_image_installs_no_training_library() -> None:
    needed = " ".join(requirements("lean"))
    assert "openvino" in needed
    assert not re.search("torch|timm|scikit|opencv|webdataset", needed)


@pytest.mark.parametrize("image", ["lean", "cpu", "cuda"])
def test_an_image_has_what_it_needs_from_the_lock_and_no_test_tool(image: str) -> None:
    locks = [ROOT / "requirements.lock", ROOT / "docker" / "faiss-cpu.lock"][: 1 if image == "cuda" else 2]
    locked = set(re.findall(r"^([a-z0-9-]+)==\S+ \\\n    --hash=", "\n".join(map(Path.read_text, locks)), re.MULTILINE))
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements(image)}
    assert {name for name in names if "faiss" in name} == {"faiss-gpu-cuvs" if image == "cuda" else "faiss-cpu"}
    assert names <= locked
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert not names.intersection(tests)


def test_all_that_pip_installs_is_pinned_by_hash() -> None:
    commands = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(commands) == 6
    for command in commands:
        ours = command == "--no-deps --no-build-isolation ."
        assert ours or command.startswith("--require-hashes "), command


def test_pip_takes_hashes_from_constraints() -> None:
    """Older ones, such as 23.2.1, refuse them, and no image could be built."""
    [version] = re.findall(r"^pip==(\d+)", (ROOT / "docker" / "pip.lock").read_text(), re.MULTILINE)
    assert int(version) >= 26


def test_the_bill_of_materials_is_of_what_the_images_install() -> None:
    makefile = (ROOT / "Makefile").read_text()
    told = dict(re.findall(r"^build/sbom/(\w+)\.json: EXTRAS := (.*)$", makefile, re.MULTILINE))
    assert told == {
        image: re.findall(rf" AS {image}\n(?:.*\n)*?RUN python extras\.py (.*?) >", DOCKERFILE)[0]
        for image in ("lean", "cpu", "cuda")
    }


def test_every_image_runs_as_a_user_without_rights() -> None:
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]:
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "lineup"


def test_containers_are_confined(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["mem_limit"] in ("1g", "2g", "4g"), name
        assert 64 <= service["pids_limit"] <= 1024, name
        assert service["tmpfs"], name
        assert service.get("user", "lineup") in ("lineup", "postgres", "101"), name
    [size] = re.findall(r"/tmp:size=(\d+)m", str(services["api"]["tmpfs"]))
    assert int(size) * 2**20 > ServiceSettings.model_fields["max_inflight_bytes"].default


def test_commands_exist(services: dict[str, Any]) -> None:
    assert re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", DOCKERFILE, re.MULTILINE)[-2:] == ['["lineup"]', '["serve"]']
    for command in (["serve"], services["key"]["command"][:2], services["migrate"]["command"]):
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, command


def test_milvus_is_asked_where_it_runs(services: dict[str, Any]) -> None:
    """Nobody runs it unless told to, and whatever asks it is told the same."""
    assert services["milvus"]["profiles"] == ["milvus"]
    [url, profile] = re.findall(r"export LINEUP_INDEX=(\S+) COMPOSE_PROFILES=(\S+)", COMPOSE)[0]
    assert (ServiceSettings(index=url).index, profile) == ("milvus+http://milvus:19530", "milvus")
    for name in ("api", "indexer"):
        assert services[name]["environment"]["LINEUP_INDEX"] == "${LINEUP_INDEX:-}"
    reached = {name for name, service in services.items() if "milvus" in service.get("networks", ["default"])}
    assert reached == {"milvus", "api", "indexer"}
    assert services["milvus"]["networks"] == ["milvus"]
    assert yaml.safe_load(COMPOSE)["networks"]["milvus"] == {"internal": True}
    for image in ("lean", "cpu", "cuda"):
        assert any(requirement.startswith("pymilvus") for requirement in requirements(image))


def test_services_wait_for_each_other(services: dict[str, Any]) -> None:
    waits = {name: dict(service.get("depends_on", {})) for name, service in services.items()}
    assert waits == {
        "db": {},
        "migrate": {"db": {"condition": "service_healthy"}},
        "key": {"migrate": {"condition": "service_completed_successfully"}},
        "indexer": {"migrate": {"condition": "service_completed_successfully"}},
        "api": {"key": {"condition": "service_completed_successfully"}},
        "milvus": {},  # replicas go on without it
        "proxy": {"api": {"condition": "service_healthy"}},
        "backup": {"migrate": {"condition": "service_completed_successfully"}},
    }
    assert services["api"]["init"] is True


def test_replicas_are_reached_through_the_proxy_alone(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "ports" in service} == {"proxy"}
    published = [port.rpartition(":")[2] for port in services["proxy"]["ports"]]
    assert published == re.findall(r"listen (\d+)", NGINX) == ["8080", "8443"]
    assert all(port.startswith("${LINEUP_ADDRESS:-127.0.0.1}:") for port in services["proxy"]["ports"])
    [place] = [mount.split(":/")[1].split(":")[0] for mount in services["proxy"]["volumes"] if "TLS" in mount]
    assert set(re.findall(r"ssl_certificate\S* /(\S+)/\w+\.pem", NGINX)) == {place}
    assert NGINX.count("{") == NGINX.count("}")


def test_limits_of_the_proxy_go_with_the_settings(services: dict[str, Any]) -> None:
    defaults = {name: field.default for name, field in ServiceSettings.model_fields.items()}
    [body], [seconds] = re.findall(r"client_max_body_size (\d+)m", NGINX), re.findall(r"read_timeout (\d+)s", NGINX)
    assert int(body) * 2**20 == defaults["max_request_bytes"]
    assert int(seconds) > defaults["request_seconds"]
    annotations = kubernetes()["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == f"{body}m"
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == seconds
    assert services["api"]["stop_grace_period"] == f"{seconds}s"


def test_replicas_and_an_indexer_find_connections(services: dict[str, Any]) -> None:
    each = ServiceSettings.model_fields["database_connections"].default + 1  # the follower has its own
    for replicas in (services["api"]["deploy"]["replicas"], kubernetes()["Deployment"]["spec"]["replicas"]):
        assert replicas == 3
        assert (replicas + 1) * each <= 97  # of Postgres's 100, three are for administrators


def kubernetes() -> dict[str, Any]:
    """The manifest's documents by kind; of two claims of a volume the last one."""
    documents = list(yaml.safe_load_all((ROOT / "docker" / "kubernetes.yml").read_text()))
    return {document["kind"]: document for document in documents}


def pods() -> dict[str, Any]:
    """What a pod of each workload is, by kind."""
    kinds = kubernetes()
    jobs = {"Job": kinds["Job"], "CronJob": kinds["CronJob"]["spec"]["jobTemplate"], "Deployment": kinds["Deployment"]}
    return {kind: job["spec"]["template"]["spec"] for kind, job in jobs.items()}


def test_pods_are_confined() -> None:
    for kind, pod in pods().items():
        assert pod["securityContext"]["runAsNonRoot"] is True, kind
        assert pod["enableServiceLinks"] is False, kind  # or a Service would set variables named like settings
        assert pod["automountServiceAccountToken"] is False, kind
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod.get("initContainers", []) + pod["containers"]:
            rights = container["securityContext"]
            assert rights["capabilities"]["drop"] == ["ALL"], kind
            assert rights["allowPrivilegeEscalation"] is False, kind
            assert rights["readOnlyRootFilesystem"] is True, kind
            assert container["resources"]["limits"]["memory"], kind
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, kind
    [uid] = re.findall(r"--uid (\d+)", DOCKERFILE)
    assert pods()["Deployment"]["securityContext"]["runAsUser"] == int(uid)


def test_what_kubernetes_is_told_belongs_together() -> None:
    kinds, pod = kubernetes(), pods()["Deployment"]
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert kinds[kind]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["spec"]["selector"] == labels
    [path] = kinds["Ingress"]["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == kinds["Service"]["metadata"]["name"]
    [container], [migration] = pod["containers"], pod["initContainers"]
    for arguments in (container["args"], migration["args"], pods()["Job"]["containers"][0]["args"][:2]):
        assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0, arguments
    for one in (container, migration, *pods()["Job"]["containers"]):
        names = {variable["name"].removeprefix("LINEUP_").lower() for variable in one["env"]}
        assert names <= set(ServiceSettings.model_fields)
    probes = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"/health/live", "/health/ready"}
    assert pod["terminationGracePeriodSeconds"] > ServiceSettings.model_fields["request_seconds"].default + 5
    memory = pod["volumes"][1]["emptyDir"]["sizeLimit"].removesuffix("Mi")
    assert int(memory) * 2**20 > ServiceSettings.model_fields["max_inflight_bytes"].default


def test_the_checkpoint_lies_where_it_is_found_unnamed(services: dict[str, Any]) -> None:
    [home] = re.findall(r"LINEUP_HOME=(\S+)", DOCKERFILE)
    for name in ("api", "indexer"):
        assert services[name]["volumes"][:2] == [
            f"home:{home}",
            f"${{LINEUP_CHECKPOINT_DIR:-../pretrained/checkpoint}}:{home}/checkpoint:ro",
        ]
    named = [name for name, service in services.items() if "LINEUP_CHECKPOINT" in service.get("environment", {})]
    assert (named, "LINEUP_CHECKPOINT" in DOCKERFILE) == ([], False)  # or no switch would be followed


@pytest.mark.parametrize("named", ["", "elsewhere"])
def test_the_demo_trains_the_checkpoint_that_its_home_serves(named: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LINEUP_", "MAKE"))}
    environment |= {"LINEUP_CHECKPOINT": named} if named else {}
    commands = subprocess.run(
        ["make", "--dry-run", "demo-train"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert f"--output {named or 'lineup-data/demo-train/checkpoint'} " in commands
    assert 'export LINEUP_HOME=lineup-data/demo-train"' in commands
    assert "LINEUP_CHECKPOINT" not in commands


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    """Counters and histograms have suffixes of their own; `up` is Prometheus's."""
    families = [(family.name, family.type) for family in Metrics().registry.collect()]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    known = {name + suffix for name, kind in families for suffix in suffixes[kind]} | {"up"}
    dashboard = json.loads((ROOT / "docker" / "monitoring" / "grafana.json").read_text())
    [group] = yaml.safe_load((ROOT / "docker" / "monitoring" / "alerts.yml").read_text())["groups"]
    questions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    questions += [rule["expr"] for rule in group["rules"]]
    named = {name for question in questions for name in re.findall(r"\b((?:lineup|process)_\w+|up)\b", question)}
    assert len(named) > 10
    assert named <= known
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert [rule["alert"] for rule in group["rules"] if f"| `{rule['alert']}` |" not in page] == []
