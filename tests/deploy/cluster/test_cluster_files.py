"""Run files and cluster files of `deploy/`: valid, with token authentication on.

`pytest tests/deploy/cluster/test_cluster_files.py`

KubeRay manifests are checked with a schema trimmed by hand (`schemas/README.md`), the launcher file with Ray's schema.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # Ray itself requires it
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from opdlm.common.config import load_config
from opdlm.deploy.cluster.learner_memory import learner_memory
from opdlm.deploy.cluster.machines import planned_machines
from opdlm.deploy.cluster.memory import DRIVER_MIB, Lengths, ModelSize, rollout_memory, teacher_memory
from opdlm.deploy.cluster.node_memory import NodeMemory, misfits, node_memory
from opdlm.deploy.cluster.placement import demands
from opdlm.deploy.run.recipes import run_files
from tests import REPOSITORY
from tests.patience import PATIENCE

DEPLOY = REPOSITORY / "deploy"
FILES = DEPLOY / "cluster_files"
KUBERAY = [FILES / "kuberay-raycluster.yaml", FILES / "kuberay-rayjob.yaml"]
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "ray.io_v1.json").read_text())


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def gpus_asked(file: str) -> float:
    return sum(count * each for _, count, each in demands(load_config(DEPLOY / file))["GPU"])


@pytest.mark.parametrize(("file", "gpus"), [("one-gpu.yaml", 1), ("node8.yaml", 8), ("multi-node.yaml", 24)])
def test_run_files_use_the_gpus_that_their_name_says(file, gpus) -> None:
    assert gpus_asked(file) == pytest.approx(gpus)


@pytest.mark.parametrize("file", KUBERAY, ids=lambda f: f.name)
def test_kuberay_manifests_fit_the_schema(file) -> None:
    manifest = yaml.safe_load(file.read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)
    spec = cluster_spec(manifest)
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(int(part) for part in spec["rayVersion"].split(".")) >= (2, 52, 0)  # the first with tokens
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == volumes
    workers = spec["workerGroupSpecs"][0]
    each = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert workers["replicas"] * each == gpus_asked("multi-node.yaml")


GIB = 2**30


def gib(quantity: str) -> float:
    """`224Gi` of Kubernetes, or a number of bytes."""
    return float(quantity.removesuffix("Gi")) if quantity.endswith("Gi") else int(quantity) / GIB


@pytest.mark.parametrize("file", KUBERAY, ids=lambda f: f.name)
def test_kuberay_pods_have_the_memory_that_the_plan_says(file) -> None:
    machines = load_config(DEPLOY / "multi-node.yaml").resources.machines
    assert machines is not None
    _, node = planned("multi-node.yaml")
    spec = cluster_spec(yaml.safe_load(file.read_text()))
    needs = [(node.nbytes / GIB, node.store_bytes / GIB), (DRIVER_MIB / 1024, 0)]
    for group, (memory, store) in zip([spec["workerGroupSpecs"][0], spec["headGroupSpec"]], needs, strict=True):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        limit, given = (
            gib(container["resources"]["limits"]["memory"]),
            gib(group["rayStartParams"]["object-store-memory"]),
        )
        (shared,) = (gib(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "shm")
        assert 1.05 * memory <= limit
        assert 1.05 * store <= given < shared < limit
    workers = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    assert gib(workers["limits"]["memory"]) == machines.memory_gib
    assert workers["requests"] == workers["limits"]


def test_the_other_files_give_ray_the_same_object_store() -> None:
    machines = load_config(DEPLOY / "multi-node.yaml").resources.machines
    assert machines is not None
    store = int(machines.object_store_gib * GIB)
    launcher, slurm = ((FILES / name).read_text() for name in ("ray-cluster.yaml", "slurm.sh"))
    assert launcher.count(f"--object-store-memory={store}") == launcher.count("ray start") == 2
    assert f"store=${{OPDLM_OBJECT_STORE:-{store}}}" in slurm
    assert slurm.count('--object-store-memory="$store"') == 2
    assert f"#SBATCH --mem={machines.memory_gib:g}G\n" in slurm


def qwen3(layers: int, width: int, intermediate: int, heads: int, tied: bool = True) -> ModelSize:
    """The size of a Qwen3 model."""
    kv, dim, vocabulary = 8, 128, 151_936
    layer = 2 * width * (heads + kv) * dim + 3 * width * intermediate + 2 * dim + 2 * width
    parameters = layers * layer + width + vocabulary * width * (1 if tied else 2)
    return ModelSize(parameters, layers, width, intermediate, heads, kv, dim, vocabulary)


MODELS = {
    "Qwen3-0.6B": qwen3(28, 1024, 3072, 16),
    "Qwen3-1.7B": qwen3(28, 2048, 6144, 16),
    "Qwen3-4B": qwen3(36, 2560, 9728, 32),
    "Qwen3-8B": qwen3(36, 4096, 12288, 32, tied=False),
}


def planned(file: str) -> tuple[list[str], NodeMemory]:
    """What does not fit on the machines that a run file names, and what a node needs; prompts of 1,024 tokens."""
    config = load_config(DEPLOY / file)
    model = MODELS[Path(config.model.teacher).name]
    limit = max(int(config.curriculum.max_new_tokens.end), *config.curriculum.max_new_tokens_per_domain.values(), 1)
    lengths = Lengths(1024, 1024 + limit, 1024 + 2 * limit)
    roles = [f(config, model, lengths) for f in (rollout_memory, teacher_memory)]
    roles.append(learner_memory(config, model, model, None, lengths))
    machines = planned_machines(config.resources, 0)
    assert machines is not None
    asked = demands(config)
    node = node_memory(config, roles, asked, model, model, lengths, 1000, machines)
    return misfits(roles, asked, node, machines), node


@pytest.mark.parametrize("file", sorted(f.name for f in DEPLOY.glob("*.yaml") if "machines:" in f.read_text()))
def test_a_run_file_fits_on_the_machines_that_it_names(file) -> None:
    assert planned(file)[0] == []


def test_every_run_file_with_gpus_names_its_machines() -> None:
    for file in run_files():
        machines = load_config(file).resources.machines
        assert (machines is not None) == (gpus_asked(file.name) > 0), file.name
        if machines is not None:
            assert machines.nodes * machines.gpus >= gpus_asked(file.name)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpecs"), {}),
        (("spec", "authOptions"), {"mode": "tokens"}),
        (("spec", "rayVersion"), 2.60),
        (("spec", "workerGroupSpecs", 0, "replicas"), "3"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "headGroupSpec", "rayStartParams", "num-gpus"), 0),
        (("apiVersion",), "ray.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_mistakes(path, value) -> None:
    manifest = copy.deepcopy(yaml.safe_load(KUBERAY[0].read_text()))
    node = manifest
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_job_and_cluster_files_have_the_same_cluster() -> None:
    """The RayJob has the same cluster as the RayCluster."""
    cluster, job = (yaml.safe_load(file.read_text()) for file in KUBERAY)
    assert cluster_spec(job) == cluster_spec(cluster)
    assert job["spec"]["entrypoint"].startswith("opdlm train ")


def test_ray_accepts_the_launcher_file() -> None:
    config = prepare_config(yaml.safe_load((FILES / "ray-cluster.yaml").read_text()))
    validate_config(config)
    starts = [
        command
        for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"])
        for command in commands
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sh with fake programs in place of Slurm, Ray and opdlm, which write down how they were called."""
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    programs = {
        "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
        # Runs the command here, without options.
        "srun": 'echo "srun $*" >>"$CALLS"; while [[ $1 == -* ]]; do [ "$1" = -w ] && shift; shift; done; exec "$@"',
        "ray": """
            if [ "$1" = list ]; then
              n=$(grep -c '^ray start' "$CALLS"); [ "$n" -gt 1 ] && n=3
              for ((i = 0; i < n; i++)); do printf '{"node_id": "1"}, '; done
            else
              [ -n "${BROKEN:-}" ] && exit 1
              token=$(wc -c <"$RAY_AUTH_TOKEN_PATH") rights=$(stat -c %a "$RAY_AUTH_TOKEN_PATH")
              echo "ray $* mode=$RAY_AUTH_MODE token=$token $rights" >>"$CALLS"
              trap 'echo "ray ended" >>"$CALLS"; exit' TERM
              while :; do sleep 0.1; done
            fi""",
        "opdlm": """
            [ -z "${UNTIL_TERM:-}" ] || trap 'sleep 0.5; echo "opdlm saved" >>"$CALLS"; exit 143' TERM
            echo "opdlm $* at=$RAY_ADDRESS" >>"$CALLS"
            while [ -n "${UNTIL_TERM:-}" ]; do sleep 0.1; done
            exit 5""",
    }
    for name, body in programs.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        settings = {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_PER_TASK": "32",
            "OPDLM_HEAD_IP": "10.0.0.1",
            "OPDLM_TOKEN_FOLDER": str(tmp_path / "tokens"),
        }
        command = ["bash", str(FILES / "slurm.sh"), *arguments]
        environment = os.environ | settings | environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start, calls, tmp_path / "tokens"


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(FILES / "slurm.sh")], check=True)


def test_the_slurm_script_starts_head_workers_and_the_run(slurm) -> None:
    start, calls, tokens = slurm
    process = start("run.yaml", "--resume")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 5, output  # opdlm's own
    lines = calls.read_text().splitlines()
    head, worker = (line for line in lines if line.startswith("ray start"))
    assert "--head --block --node-ip-address=10.0.0.1 --port=6379 --num-cpus=32 --dashboard-host=127.0.0.1" in head
    assert "--block --address=10.0.0.1:6379 --num-cpus=32" in worker
    assert all(line.endswith("mode=token token=64 600") for line in (head, worker))
    assert "srun --nodes=2 --ntasks=2 --overlap --exclude=node1 ray start" in " ".join(lines)
    assert lines.index(head) < lines.index(worker) < lines.index("opdlm train run.yaml --resume at=10.0.0.1:6379")
    assert list(tokens.iterdir()) == []  # the token is deleted at the end of the job


def test_slurms_term_lets_the_run_save(slurm) -> None:
    start, calls, _ = slurm
    process = start("run.yaml", UNTIL_TERM="1")
    while process.poll() is None and "opdlm train" not in (calls.read_text() if calls.exists() else ""):
        signal.sigtimedwait([], 0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, output
    lines = calls.read_text().splitlines()
    assert "opdlm saved" in lines
    assert "ray ended" not in lines[: lines.index("opdlm saved")]


def test_the_slurm_script_needs_a_run_file(slurm) -> None:
    start, calls, _ = slurm
    process = start()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "usage: sbatch" in output
    assert not calls.exists()


def test_a_head_that_does_not_start_ends_the_job(slurm) -> None:
    start, calls, tokens = slurm
    process = start("run.yaml", BROKEN="1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "slurm.sh: Ray ended on a node before the run" in output
    assert "opdlm" not in calls.read_text()
    assert list(tokens.iterdir()) == []
