"""Runs on Kubernetes as a JobSet: TPU slices of GKE, also several, and nodes of GPUs."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from jdpo.config.addresses import without_queries
from jdpo.launch.kube_names import checked_image, checked_label, checked_namespace, checked_object
from jdpo.launch.launch_options import option, pairs_of
from jdpo.launch.launched import Advice, Launch, put_paths
from jdpo.launch.rendering import render
from jdpo.launch.request import LaunchRequest
from jdpo.launch.run_environment import COORDINATOR_PORT, Variable, environment_of
from jdpo.planning.machines import Machine

SHARED = "/shared"
"""Where the volume is mounted, and where the run starts: relative paths of a config are on the volume."""

CONFIG = "/etc/jdpo/config.yaml"
"""The config in a pod, out of a ConfigMap."""

_MOST_BYTES = 1_000_000
"""The size of a ConfigMap, of which Kubernetes refuses 1 MiB."""

_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSetOptions:
    """The options of `jdpo launch jobset`."""

    image: str = option(
        "IMAGE",
        "Container image with jdpo, as the project's Dockerfile builds it.",
        required="the image that the nodes pull, such as us-docker.pkg.dev/PROJECT/REPOSITORY/jdpo:0.2.0; the "
        "Dockerfile in the project's root builds one (docs/launch.md)",
    )
    volume: str = option(
        "CLAIM",
        "PersistentVolumeClaim that all pods can write (ReadWriteMany, such as Filestore), for output_dir and caches. "
        "It is mounted at /shared, where the run starts. A run with a single pod and a mirror needs none.",
    )
    namespace: str = option("NAMESPACE", "Namespace of everything that is created.", default="default")
    secret_store: str = option(
        "NAME", "Kubernetes Secret that holds the variables of --secret.", default="jdpo-secrets"
    )
    service_account: str = option("NAME", "Kubernetes service account of the pods, such as one that may read buckets.")
    replace: bool = option("", "Delete a JobSet of this name first; its pods save.", default=False)
    queue: str = option("NAME", "Queue of Kueue that the JobSet waits in.")
    node_selector: tuple[str, ...] = option(
        "KEY=VALUE",
        "Label of the nodes; may be repeated. For GPUs it replaces the labels of GKE.",
        default=(),
    )
    spot: bool = option("", "Use spot nodes.", default=False)
    reservation: str = option("NAME", "Use the nodes of this reservation.")
    root: bool = option(
        "", "Run as root and without restrictions, for nodes whose devices only root can open.", default=False
    )
    grace_seconds: int = option(
        "SECONDS",
        "Time that a pod has to save after SIGTERM: more than a step and a save. A pod that has saved ends at once.",
        default=600,
    )


def jobset(request: LaunchRequest, options: JobSetOptions) -> Launch:
    """Returns the manifest of a JobSet, and the commands that create it.

    A restart is JobSet's own work: its failure policy starts all pods again, see `jdpo.exit_codes.RESTART_CODES`.

    Raises:
      ValueError: the machine cannot be had as a JobSet, or the config cannot be stored in a ConfigMap.
    """
    _check_machine(request.machine)
    _check_config(request)
    _check_names(options)
    _check_volume(request, options)
    path = request.folder / "jobset.yaml"
    kubectl = ("kubectl", "--namespace", options.namespace)
    delete = (*kubectl, "delete", "--ignore-not-found", "--filename", str(path))
    return Launch(
        files={path: _manifest(request, options)},
        # Not `apply`: on a JobSet that has ended it would change nothing, and start nothing.
        commands=(*([delete] if options.replace else []), (*kubectl, "create", "--filename", str(path))),
        installs={
            "kubectl": "install it (https://kubernetes.io/docs/tasks/tools), and get access to the cluster "
            "(`gcloud container clusters get-credentials CLUSTER`)"
        },
        before=_before(request, options),
        after=_after(request, shlex.join(kubectl), shlex.join(delete)),
        failed=(
            Advice(
                "If it exists already, look at it, and then launch with --replace: the run continues from its last "
                "checkpoint.",
                f"{shlex.join(kubectl)} describe jobset {request.name}",
            ),
        ),
    )


def _manifest(request: LaunchRequest, options: JobSetOptions) -> str:
    machine = request.machine
    resource = "nvidia.com/gpu" if machine.is_gpu else "google.com/tpu"
    variables = (*environment_of(request, cache=f"{SHARED}/cache"), *_place_of(request))
    return render(
        "jobset.yaml.jinja",
        request,
        options,
        config_name=f"{request.name}-config",
        shared=SHARED,
        config_folder=str(Path(CONFIG).parent),
        config_file=Path(CONFIG).name,
        command=[_literal(word) for word in _command(request)],
        command_line=shlex.join(request.words(CONFIG)),
        replicas=1 if machine.is_gpu else machine.slices,
        pods=machine.num_hosts if machine.is_gpu else machine.hosts_per_slice,
        resource=resource,
        selector=_selector(machine, options),
        tolerations=[resource, *(["cloud.google.com/gke-spot"] if options.spot else [])],
        variables=[each._replace(value=_literal(each.value)) for each in variables],
        index=_INDEX,
    )


def _check_machine(machine: Machine) -> None:
    if not machine.is_gpu and machine.slices > 1 and machine.hosts_per_slice == 1:
        raise ValueError(
            f"{machine.name}: GKE joins slices of several hosts each, and {machine.name.partition('x')[2]} is a single "
            "host; use larger slices, or one slice of the same number of chips"
        )


def _check_config(request: LaunchRequest) -> None:
    if len(request.config_text.encode()) > _MOST_BYTES:
        raise ValueError(f"{request.config_path} is too large for a ConfigMap, which holds at most 1 MiB")
    for text in (request.config_text, *request.overrides):
        if without_queries(text) != text:
            raise ValueError(
                f"{request.config_path}: an address with a query (https://...?...) may hold a key or a signature, and "
                "the config is stored in a ConfigMap that others can read; use a gs://, s3:// or hf:// address, whose "
                "keys come from the environment"
            )


def _check_volume(request: LaunchRequest, options: JobSetOptions) -> None:
    if options.volume:
        return
    if request.config.mirror and request.machine.num_hosts == 1:
        if local := request.local_paths():
            raise ValueError(
                f"{', '.join(local)}: the pod has no such file; give --volume CLAIM and put it there, or use an "
                "address such as gs://bucket/pairs.jsonl"
            )
        return
    raise ValueError(
        "`jdpo launch jobset` needs --volume CLAIM: a PersistentVolumeClaim that all pods can write (ReadWriteMany), "
        "for output_dir and caches. A pod's own disk is gone with the pod, and with it every checkpoint; a run with a "
        "single pod can do without if its config has a mirror"
    )


def _check_names(options: JobSetOptions) -> None:
    if options.spot and options.reservation:
        raise ValueError("--spot and --reservation exclude each other: nodes of a reservation are not spot nodes")
    checked_image(options.image)
    checked_namespace(options.namespace)
    for name in ("volume", "secret_store", "service_account", "queue"):
        if value := getattr(options, name):
            checked_object(value, name)
    if options.reservation:
        checked_label("cloud.google.com/reservation-name", options.reservation, "reservation")
    for key, value in pairs_of(options.node_selector, "node_selector").items():
        checked_label(key, value, "node_selector")


def _command(request: LaunchRequest) -> list[str]:
    """Returns the command of a pod: the run, or the doctor first and the run only if that finds nothing."""
    command, doctor = request.words(CONFIG), request.doctor_words(CONFIG)
    # exec: the run, not the shell, gets SIGTERM.
    return command if doctor is None else ["/bin/sh", "-c", f"{shlex.join(doctor)} && exec {shlex.join(command)}"]


def _literal(text: str) -> str:
    """Returns text that Kubernetes takes as it is: in commands and values of variables it expands $(NAME)."""
    return text.replace("$(", "$$(")


def _selector(machine: Machine, options: JobSetOptions) -> dict[str, str]:
    own = pairs_of(options.node_selector, "node_selector")
    if machine.is_gpu:
        labels = own or {"cloud.google.com/gke-accelerator": machine.gke_accelerator}
    else:
        labels = {
            "cloud.google.com/gke-tpu-accelerator": machine.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": str(machine.gke_topology),
            **own,
        }
    if options.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    if options.reservation:
        labels["cloud.google.com/reservation-name"] = options.reservation
    return labels


def _place_of(request: LaunchRequest) -> tuple[Variable, ...]:
    """Returns the variables about the number of processes; JAX_PROCESS_ID is a field of the pod."""
    machine = request.machine
    if machine.num_hosts == 1:
        return (Variable("JAX_NUM_PROCESSES", "1", "one pod: there is no other to join"),)
    if not machine.is_gpu:
        return ()  # GKE sets TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and MEGASCALE_*, from which JAX detects the cluster
    # Kubernetes tells a pod its own index, but not the number of pods.
    first = f"{request.name}-worker-0-0.{request.name}:{COORDINATOR_PORT}"
    return (
        Variable("JAX_COORDINATOR_ADDRESS", first, "the first pod, by the name that the headless service gives it"),
        Variable("JAX_NUM_PROCESSES", str(machine.num_hosts), "one process per node"),
    )


def _before(request: LaunchRequest, options: JobSetOptions) -> tuple[Advice, ...]:
    kubectl = f"kubectl --namespace {shlex.quote(options.namespace)}"
    literals = " ".join(f'--from-literal={name}="${name}"' for name in request.secrets)
    return (
        Advice(
            "Install JobSet 0.6 or later in the cluster, unless it is there (https://jobset.sigs.k8s.io/docs/installation)."
        ),
        Advice(
            "Store the secrets, from variables of your shell:",
            f"{kubectl} create secret generic {shlex.quote(options.secret_store)} {literals}",
        ),
        *(_of_volume(request, kubectl, options.volume) if options.volume else ()),
    )


def _of_volume(request: LaunchRequest, kubectl: str, volume: str) -> list[Advice]:
    return [
        Advice(
            "Create the volume, unless it is there; all pods write to it (ReadWriteMany). See docs/launch.md.",
            f"{kubectl} get pvc {shlex.quote(volume)}",
        ),
        *put_paths(request, SHARED, on="volume", by="pods"),
    ]


def _after(request: LaunchRequest, kubectl: str, delete: str) -> tuple[Advice, ...]:
    of_all = f"jobset.sigs.k8s.io/jobset-name={request.name}"
    return (
        Advice("Watch the pods, and why they wait:", f"{kubectl} get pods --selector {of_all} --watch"),
        Advice(
            "Read the log of process 0, or of all processes without the last selector:",
            f"{kubectl} logs --follow --selector {of_all},jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0",
        ),
        Advice("See restarts, and whether it has completed or failed:", f"{kubectl} describe jobset {request.name}"),
        Advice("End it; the pods save first. The same `jdpo launch` continues it:", delete),
    )
