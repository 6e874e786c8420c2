"""YAML and container files of scripts/launch against the schemas of those who read them."""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml
from launch_tools import tool, validate
from slow_values import slow
from tiny_run import ROOT

LAUNCH = ROOT / "scripts/launch"
GKE = sorted(LAUNCH.glob("gke_*.yaml"))
SKYPILOT = sorted(LAUNCH.glob("skypilot_*.yaml"))

# What JobSet v1alpha2 has beside the template of a job (api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset).
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"]


def closed(required: tuple[str, ...] = (), **properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, COUNT, FLAG, TEXTS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "array", "items": {"type": "string"}}
JOBSET = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(("name",), name=TEXT, namespace=TEXT, labels={"type": "object"}, annotations={"type": "object"}),
    spec=closed(
        ("replicatedJobs",),
        network=closed(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        failurePolicy=closed(
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={
                "type": "array",
                "items": closed(
                    ("name", "action"),
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ACTIONS},
                    onJobFailureReasons=TEXTS,
                    onJobFailureMessagePatterns=TEXTS,
                    targetReplicatedJobs=TEXTS,
                ),
            },
        ),
        replicatedJobs={"type": "array", "items": closed(("name", "template"), name=TEXT, groupName=TEXT, replicas=COUNT, template={"type": "object"})},
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
)


@pytest.mark.parametrize("path", GKE, ids=lambda path: path.stem)
def test_jobsets_are_what_the_cluster_takes(path):
    jobset = yaml.safe_load(path.read_text())
    program = "import jsonschema; jsonschema.validate(value['jobset'], value['schema'])"
    assert validate(program, {"jobset": jobset, "schema": JOBSET}) is None
    assert validate(program, {"jobset": jobset | {"sepc": {}}, "schema": JOBSET})
    for replicated in jobset["spec"]["replicatedJobs"]:
        template = replicated["template"]
        assert template.keys() <= {"metadata", "spec"}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, "spec": template["spec"]}
        program = "import kubernetes_validate; kubernetes_validate.validate(value, '1.33', strict=True)"
        assert validate(program, job) is None
        assert validate(program, job | {"spec": job["spec"] | {"paralellism": 2}})


def container(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    (found,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_processes_of_the_gpu_set_find_each_other():
    """The address is the name that JobSet gives the first pod, and there is a process a pod."""
    jobset = yaml.safe_load((LAUNCH / "gke_gpu.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    variables = {item["name"]: item.get("value") for item in container(jobset)["env"]}
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == name and int(port) in [item["containerPort"] for item in container(jobset)["ports"]]
    assert int(variables["JAX_NUM_PROCESSES"]) == job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"


@pytest.mark.parametrize("path", GKE, ids=lambda path: path.stem)
def test_a_set_starts_again_as_a_whole_but_not_on_wrong_input(path):
    jobset = yaml.safe_load(path.read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert {"name": "SFT_JAX_RESTARTS", "value": "0"} in container(jobset)["env"]
    config = next(argument for argument in container(jobset)["args"] if argument.startswith("--config="))
    assert (ROOT / re.split("[=:]", config)[1]).is_file()


@pytest.mark.parametrize("path", GKE, ids=lambda path: path.stem)
def test_pods_ask_for_the_disk_that_the_model_takes(path):
    """The cache is a disk of the node; the model is downloaded there, by its parameters in 16 bits."""
    jobset = yaml.safe_load(path.read_text())
    (model,) = [argument.partition("=")[2] for argument in container(jobset)["args"] if argument.startswith("--config.model.path=")]
    size = 2 * float(re.search(r"-(\d+)B", model)[1])  # GB
    asked = container(jobset)["resources"]["requests"]["ephemeral-storage"]
    assert 1.074 * int(asked.removesuffix("Gi")) > 1.3 * size
    assert f"| `{path.name}` |" in (LAUNCH / "gke.md").read_text() and f"| {asked} |" in (LAUNCH / "gke.md").read_text()


def test_the_gpu_image_finds_the_driver_where_gke_mounts_it():
    assert "ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in (LAUNCH / "Dockerfile.gpu").read_text().splitlines()
    assert "LD_LIBRARY_PATH" not in {item["name"] for item in container(yaml.safe_load((LAUNCH / "gke_gpu.yaml").read_text()))["env"]}


def test_the_documented_container_writes_as_the_one_who_starts_it():
    (command,) = [line for line in (LAUNCH / "gke.md").read_text().splitlines() if line.strip().startswith("docker run")]
    assert '--user "$(id -u):$(id -g)"' in command


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
def test_the_default_model_has_a_template_for_the_default_chats(path, assets):
    """A base has none, and the run would end with exit code 2."""
    variables = yaml.safe_load(path.read_text())["envs"]
    with open(ROOT / variables["TRAIN"]) as rows:
        assert json.loads(next(rows)).keys() == {"messages"} and variables["CONFIG"] == "configs/sft.py"
    assert (assets / "chat_templates/stock" / f"{variables['MODEL'].replace('/', '-')}.jinja").is_file()


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
def test_setup_makes_the_environment_that_the_run_uses(path):
    task = yaml.safe_load(path.read_text())
    script, extras = task["setup"].split()
    assert os.access(ROOT / script, os.X_OK) and extras in ("cuda,remote", "tpu,remote") and ".venv/bin/python -m sft_jax.train" in task["run"]


@pytest.mark.slow
def test_skypilot_knows_the_documented_commands():
    """Its own parser takes them; no server is asked."""
    lines = [line.strip() for line in (LAUNCH / "skypilot.md").read_text().splitlines() if line.startswith("    sky jobs ")]
    assert {line.split()[2] for line in lines} == {"launch", "logs", "cancel"}
    program = (
        "import os; from sky.client.cli.command import cli; os.environ['HF_TOKEN'] = 'x'\n"
        "jobs = cli.commands['jobs']; jobs.commands[value[2]].make_context(value[2], value[3:])"
    )
    for line in lines:
        assert validate(program, shlex.split(line)) is None
    assert validate(program, ["sky", "jobs", "logs", "mine"])


@pytest.mark.slow
@pytest.mark.parametrize("path", [SKYPILOT[0], *slow(*SKYPILOT[1:])], ids=lambda path: path.stem)
def test_tasks_are_what_skypilot_takes(path):
    """Its own schemas, of the task and of its resources."""
    task = yaml.safe_load(path.read_text())
    program = (
        "import jsonschema; from sky.utils import schemas\n"
        "jsonschema.validate(value, schemas.get_task_schema()); jsonschema.validate(value['resources'], schemas.get_resources_schema())"
    )
    assert validate(program, task) is None
    assert validate(program, task | {"num_node": 2})
    assert validate(program, task | {"resources": task["resources"] | {"accelerator": "H100"}})
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True).returncode == 0


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("Dockerfile.*")), ids=lambda path: path.suffix[1:])
def test_container_files(path):
    """hadolint has nothing to say, and what is copied is there and not ignored."""
    copied = [word for line in path.read_text().splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept and all((ROOT / name).exists() for name in copied)
    result = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
