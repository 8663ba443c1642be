"""JobSet manifests: typed models, schemas of Kubernetes, what restarts, and values that need quotes."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError

from jdpo.cli.commands.clusters.launch import planned
from jdpo.exit_codes import EXIT_CODES
from jdpo.launch.launched import Launch
from jdpo.planning.machines import machine_of
from jdpo.processes.detection import find_cluster
from tests.launch.jobset_controller import Pod, outcome

MACHINES = ("v6e-1", "v6e-16", "2xv5e-16", "v5p-64", "tpu7x-16", "h100", "h100x16", "h200x8")
ALL_OPTIONS = (
    *("--spot", "--doctor", "--queue=team", "--service_account=trainer", "--namespace=train"),
    *("--env=A=1", "--secret=WANDB_API_KEY", "--node_selector=example.com/pool=big", "--grace_seconds=900"),
)
KUBERNETES = "1.31.0"
"""The oldest in which podFailurePolicy is stable."""


def launch(config: Path, machine: str, *words: str) -> Launch:
    return planned(["jobset", str(config), "--on", machine, "--image", "repo/jdpo:1", "--volume", "claim", *words])


def documents(config: Path, machine: str, *words: str) -> dict[str, Any]:
    """Returns the documents of the manifest by kind."""
    (text,) = launch(config, machine, *words).files.values()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def job_of(jobset: Any) -> dict[str, Any]:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job_template(jobset)}


def job_template(jobset: Any) -> Any:
    return jobset["spec"]["replicatedJobs"][0]["template"]


def container_of(jobset: Any) -> Any:
    (container,) = job_template(jobset)["spec"]["template"]["spec"]["containers"]
    return container


def variables_of(jobset: Any) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container_of(jobset)["env"] if "value" in each}


def validate(document: Any) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        *(pytest.param(machine, (), id=machine) for machine in MACHINES),
        *(pytest.param(machine, ALL_OPTIONS, id=f"{machine}-all-options") for machine in ("2xv5e-16", "h100x16")),
    ],
)
def test_manifests_are_what_the_api_reads(config: Path, machine: str, words: tuple[str, ...]) -> None:
    found = documents(config, machine, *words)
    jobset = found["JobSet"]
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert model is not None
    assert model.to_dict() == jobset  # a key that the model does not know would be missing
    # Each part by the schema of Kubernetes itself; it has none for JobSet.
    for document in (found["ConfigMap"], found["Service"], job_of(jobset)):
        validate(document)


def test_the_claim_in_the_docs_is_one_that_kubernetes_reads() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "launch.md").read_text(encoding="utf-8")
    claim = yaml.safe_load(textwrap.dedent(page.partition("<<'CLAIM'\n")[2].partition("   CLAIM")[0]))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    validate(claim)
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError, match="accessMode"):
        validate(claim)


def test_broken_manifests_are_refused(config: Path) -> None:
    found = documents(config, "v6e-16")
    jobset = copy.deepcopy(found["JobSet"])
    jobset["spec"]["replicatedJobs"][0]["replicas"] = "two"
    with pytest.raises(ValidationError, match="replicas"):
        JobsetV1alpha2JobSet.from_dict(jobset)
    jobset = copy.deepcopy(found["JobSet"])
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert model is not None
    assert model.to_dict() != jobset
    service = copy.deepcopy(found["Service"])
    service["spec"]["clusterIp"] = "None"
    with pytest.raises(kubernetes_validate.ValidationError, match="clusterIp"):
        validate(service)
    job = copy.deepcopy(job_of(found["JobSet"]))
    job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="string"):
        validate(job)


@pytest.mark.parametrize(
    ("machine", "replicas", "pods", "resource", "selector"),
    [
        ("v6e-16", 1, 4, ("google.com/tpu", "4"), ("tpu-v6e-slice", "4x4")),
        ("v6e-8", 1, 1, ("google.com/tpu", "8"), ("tpu-v6e-slice", "2x4")),
        ("2xv5e-16", 2, 4, ("google.com/tpu", "4"), ("tpu-v5-lite-podslice", "4x4")),
        ("v5p-64", 1, 8, ("google.com/tpu", "4"), ("tpu-v5p-slice", "2x4x4")),
        ("tpu7x-16", 1, 2, ("google.com/tpu", "4"), ("tpu7x", "2x2x2")),  # 16 devices on eight chips
        ("h100x16", 1, 2, ("nvidia.com/gpu", "8"), ("nvidia-h100-80gb", None)),
        ("h200x2", 1, 1, ("nvidia.com/gpu", "2"), ("nvidia-h200-141gb", None)),
    ],
)
def test_one_pod_per_host(
    config: Path, machine: str, replicas: int, pods: int, resource: tuple[str, str], selector: tuple[str, str | None]
) -> None:
    jobset = documents(config, machine)["JobSet"]
    job = job_template(jobset)["spec"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == replicas
    assert (job["parallelism"], job["completions"]) == (pods, pods)
    assert replicas * pods == machine_of(machine).num_hosts
    assert container_of(jobset)["resources"]["limits"] == {resource[0]: resource[1]}
    labels = job["template"]["spec"]["nodeSelector"]
    kind = "gke-accelerator" if resource[0] == "nvidia.com/gpu" else "gke-tpu-accelerator"
    assert labels.pop(f"cloud.google.com/{kind}") == selector[0]
    assert labels.pop("cloud.google.com/gke-tpu-topology", None) == selector[1]
    assert not labels


def test_processes_find_each_other(config: Path) -> None:
    found = documents(config, "h100x16", "--name=big")
    variables, service = variables_of(found["JobSet"]), found["Service"]
    network = found["JobSet"]["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "subdomain": service["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    # <JobSet>-<replicated job>-<index of the Job>-<index of the pod>.<subdomain>
    assert variables["JAX_COORDINATOR_ADDRESS"] == "big-worker-0-0.big:8476"
    assert variables["JAX_NUM_PROCESSES"] == "2"
    (index,) = [each for each in container_of(found["JobSet"])["env"] if each["name"] == "JAX_PROCESS_ID"]
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    for pod in range(2):
        joined = find_cluster(variables | {"JAX_PROCESS_ID": str(pod), "JOB_COMPLETION_INDEX": str(pod)})
        assert joined is not None
        assert (joined.num_processes, joined.process_id, joined.local_device_ids) == (2, pod, None)
        assert joined.coordinator_address == variables["JAX_COORDINATOR_ADDRESS"]
    # One pod is told that it is alone: JOB_COMPLETION_INDEX alone looks like one of several.
    alone = find_cluster(variables_of(documents(config, "h100x8")["JobSet"]) | {"JOB_COMPLETION_INDEX": "0"})
    assert alone is not None
    assert alone.num_processes == 1
    assert variables_of(documents(config, "v6e-8")["JobSet"])["JAX_NUM_PROCESSES"] == "1"
    # On several TPU hosts GKE tells everything, also for several slices.
    assert not [name for name in variables_of(documents(config, "2xv5e-16")["JobSet"]) if name.startswith("JAX_")]


@pytest.mark.parametrize("row", EXIT_CODES, ids=lambda row: str(row.code))
def test_exit_codes_restart_as_the_table_says(config: Path, row: Any) -> None:
    jobset = documents(config, "2xv5e-16")["JobSet"]
    expected = "restart" if row.restart else "complete" if row.code == 0 else "failed"
    others = [Pod(75 if row.restart else row.code)] * 4  # one that is lost ends the others with 75
    assert outcome(jobset, [[Pod(row.code), *others[1:]], others]) == expected
    if row.code:  # a pod that the cluster takes away may fail in any way
        assert outcome(jobset, [[Pod(row.code, disrupted=True), *[Pod(75)] * 3], [Pod(75)] * 4]) == "restart"


def test_restarts_are_counted_and_one_error_stops_all_slices(config: Path) -> None:
    jobset = documents(config, "2xv5e-16", "--max_restarts=3")["JobSet"]
    lost = [[Pod(137), *[Pod(75)] * 3], [Pod(75)] * 4]
    assert [outcome(jobset, lost, restarts=done) for done in (0, 2, 3)] == ["restart", "restart", "failed"]
    assert outcome(jobset, [[Pod(75)] * 4, [Pod(1), *[Pod(75)] * 3]]) == "failed"


@pytest.mark.parametrize("machine", ["v6e-16", "h100x16"])
def test_values_are_taken_literally(config: Path, machine: str) -> None:
    odd = config.with_name('it\'s "the" $HOME\n- one #2.yaml')
    odd.write_text(config.read_text() + "beta: 0.2  # \t: not a comment of ours, $(HOSTNAME)\n\n", encoding="utf-8")
    value = 'a $(NAME) $HOME "quoted" \\ \' : #\nline'
    found = documents(odd, machine, f"--env=ODD={value}", "--env=NUMBER=1e3", "run_name=it's $(X)")
    assert found["ConfigMap"]["data"]["config.yaml"] == odd.read_text()
    variables = variables_of(found["JobSet"])
    # Kubernetes turns $$( into $( and expands the rest.
    assert variables["ODD"].replace("$$(", "$(") == value
    assert "$(" not in variables["ODD"].replace("$$(", "")
    assert variables["NUMBER"] == "1e3"
    assert container_of(found["JobSet"])["command"] == ["jdpo", "dpo", "/etc/jdpo/config.yaml", "run_name=it's $$(X)"]


def test_the_doctor_runs_before_the_run(config: Path) -> None:
    shell, option, script = container_of(documents(config, "v6e-16", "--doctor", "run_name=it's")["JobSet"])["command"]
    assert (shell, option) == ("/bin/sh", "-c")
    run = "/etc/jdpo/config.yaml 'run_name=it'\"'\"'s'"
    assert script == f"jdpo doctor {run} --task dpo && exec jdpo dpo {run}"


def test_secrets_are_named_and_not_written(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_real_token")
    config.write_text(config.read_text() + "report_to: wandb\n", encoding="utf-8")
    made = launch(config, "v6e-16", "--secret=AWS_SECRET_ACCESS_KEY")
    env = container_of(documents(config, "v6e-16", "--secret=AWS_SECRET_ACCESS_KEY")["JobSet"])["env"]
    references = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in env if "valueFrom" in each}
    assert {name: each["optional"] for name, each in references.items()} == {
        "HF_TOKEN": True,
        "WANDB_API_KEY": True,
        "AWS_SECRET_ACCESS_KEY": False,  # asked for, so a pod without it does not start
    }
    (create,) = [each.command for each in made.before if "create secret" in each.command]
    assert '--from-literal=WANDB_API_KEY="$WANDB_API_KEY"' in create
    assert "hf_a_real_token" not in made.described() + create
    # The Secret that this command makes.
    names = dict.fromkeys(references, "dmFsdWU=")
    validate({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "jdpo-secrets"}, "data": names})
    with pytest.raises(kubernetes_validate.ValidationError, match="string"):
        validate({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "jdpo-secrets"}, "data": {"A": 1}})


def test_the_environment_is_that_of_all_launchers(config: Path) -> None:
    for machine, own in (("v6e-16", "LIBTPU_INIT_ARGS"), ("h100x16", "XLA_CLIENT_MEM_FRACTION")):
        variables = variables_of(documents(config, machine, "--env=PYTHONUNBUFFERED=0")["JobSet"])
        assert own in variables
        assert variables["XDG_CACHE_HOME"].startswith("/shared/")
        assert variables["PYTHONUNBUFFERED"] == "0"  # the user's value wins


def test_nodes_of_a_reservation(config: Path) -> None:
    pod = job_template(documents(config, "v6e-16", "--reservation=ours")["JobSet"])["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"


def test_local_inputs_are_named(config: Path) -> None:
    Path("pairs.jsonl").touch()
    made = launch(config, "v6e-16", "datasets=[pairs.jsonl, gs://bucket/more.jsonl]", "eval_datasets=none.jsonl")
    said = [each.what for each in made.before if "on the volume" in each.what]
    assert len(said) == 1
    assert "/shared/pairs.jsonl" in said[0]


@pytest.mark.parametrize("key", ["datasets", "eval_datasets"])
def test_rows_on_s3_need_its_keys(config: Path, key: str) -> None:
    names = {
        each["name"] for each in container_of(documents(config, "v6e-16", f"{key}=s3://b/x.jsonl")["JobSet"])["env"]
    }
    assert names >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_a_single_pod_with_a_mirror_needs_no_volume(config: Path) -> None:
    words = ["jobset", str(config), "--on", "v6e-8", "--image", "repo/jdpo:1", "mirror=s3://bucket/runs/first"]
    made = planned(words)
    (text,) = made.files.values()
    jobset = next(each for each in yaml.safe_load_all(text) if each["kind"] == "JobSet")
    volumes = {each["name"]: each for each in job_template(jobset)["spec"]["template"]["spec"]["volumes"]}
    assert volumes["shared"] == {"name": "shared", "emptyDir": {}}
    assert {each["name"] for each in container_of(jobset)["env"]} >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert "volume" not in "".join(each.what for each in made.before)
    validate(job_of(jobset))
    Path("pairs.jsonl").touch()
    with pytest.raises(ValueError, match="no such file"):
        planned([*words, "datasets=pairs.jsonl"])
    with pytest.raises(ValueError, match="ReadWriteMany"):
        planned([*words[:2], "--on", "v6e-16", *words[4:]])


def test_the_root_user_and_labels_of_other_clouds(config: Path) -> None:
    jobset = documents(config, "h100x8", "--root", "--node_selector=node.kubernetes.io/instance-type=p5.48xlarge")[
        "JobSet"
    ]
    pod = job_template(jobset)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 0
    # Otherwise a pod fulfils the Pod Security Standard `restricted`.
    restricted = documents(config, "h100x8")["JobSet"]
    assert not container_of(jobset).get("securityContext")
    assert container_of(restricted)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    user = job_template(restricted)["spec"]["template"]["spec"]["securityContext"]
    assert (user["runAsNonRoot"], user["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "2xv6e-8"], "single host"),
        (["--on", "v6e-17"], "did you mean"),
        (["--name", "Bad_Name"], "'bad-name'"),
        (["--name", "a" * 41], "40"),
        (["--image", "jdpo image"], "--image"),
        (["--image", "repo/jdpo"], "without a tag"),
        (["--spot", "--reservation", "mine"], "exclude each other"),
        (["--namespace", "Team"], "--namespace"),
        (["--volume", "my claim"], "--volume"),
        (["--secret_store", "A"], "--secret_store"),
        (["--node_selector", "pool"], "NAME=VALUE"),
        (["--node_selector", "pool=a b"], "63 letters"),
        (["--env", "HF_TOKEN=abc"], "--secret HF_TOKEN"),
        (["--env", "A"], "NAME=VALUE"),
        (["--env", "A-B=1"], "name of an environment variable"),
        (["datasets=https://host/rows.jsonl?sig=abc"], "ConfigMap"),
        (["learning_rat=1"], "learning_rate"),
        (["mesh.fsdp=8", "mesh.data=4"], "v6e-16: mesh data=4"),
        (["mesh.slices=2"], "1 slice"),
        (["--on", "2xv5e-16", "mesh.data=1", "mesh.fsdp=32"], "2 slices of 16"),
        (["global_batch_size=24"], "multiple of 16"),
    ],
)
def test_what_cannot_be_launched_is_refused(config: Path, words: list[str], message: str) -> None:
    machine = [] if "--on" in words else ["--on", "v6e-16"]
    with pytest.raises(ValueError, match=message) as caught:
        planned(["jobset", str(config), *machine, "--image", "a/b:1", "--volume", "claim", *words])
    assert "abc" not in str(caught.value)
