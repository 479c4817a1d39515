"""Check a cluster file before machines cost money: by Ray's own schema, and by rules against known mistakes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_ray.config.cluster import ClusterFile
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.data.files import one_line
from minimind_ray.on_ray.auth_token import TOKEN
from minimind_ray.on_ray.versions import TESTED, private_parts

SDKS = {"aws": ("boto3", "aws"), "gcp": ("googleapiclient", "gcp"), "azure": ("azure.identity", "azure")}
EXAMPLES = re.compile(r"\b(192\.0\.2|198\.51\.100|203\.0\.113)\.\d+\b")  # RFC 5737: addresses for examples.
SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a secret": re.compile(
        r"\b(RAY_AUTH_TOKEN|WANDB_API_KEY|HF_TOKEN|AWS_SECRET_ACCESS_KEY)\s*[=:]\s*[\"']?[\w/+-]{8,}"
    ),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
}
LONG_IDLE = 60
"""Warn if idle machines stay longer than so many minutes."""
KUBERAY = "1.7.0"
"""The first version of KubeRay with workerGroupSpecs[].priority. (authOptions came with 1.5.1.)"""


@dataclass(frozen=True)
class Finding:
    """A problem (`what`) and its solution (`fix`). A `note` is a remark: it does not change the exit code."""

    what: str
    fix: str
    note: bool = False


def check_cluster(cluster: ClusterFile, asked: Sequence[ScaleConfig] = ()) -> list[Finding]:
    """Return all findings about a cluster file, errors first. `asked` are the scales of experiments for the cluster."""
    rules = [_secrets, _kuberay_rules] if cluster.provider == "kuberay" else [_secrets, *VM_RULES]
    findings: list[Finding] = []
    for rule in [_schema, *rules, _prices]:
        try:
            findings += rule(cluster)
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            what = f"a section does not have the expected structure ({type(error).__name__}: {one_line(error)})"
            findings.append(Finding(what, "compare the file with the file of the same kind in cluster/"))
    for scale in dict.fromkeys(scale.model_dump_json() for scale in asked):
        findings += _capacity(cluster, ScaleConfig.model_validate_json(scale))
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.note)


def _schema(cluster: ClusterFile) -> Iterator[Finding]:
    """Check the file by Ray's JSON schema, or for KubeRay by the function with which Ray's autoscaler reads it."""
    if not private_parts():
        yield Finding(
            "the file is not compared with Ray's schema, and its versions of Ray are not compared with each other: "
            f"both need private parts of Ray, tested with Ray {' and '.join(TESTED)}",
            f"check the file with ray=={TESTED[-1]} and without MINIMIND_PUBLIC_ONLY, or compare it with the file of "
            "the same kind in cluster/",
            note=True,
        )
        return
    try:
        prepared(cluster)
    except (Exception, SystemExit) as error:
        message = getattr(error, "message", None) or one_line(error) or type(error).__name__
        where = ".".join(map(str, getattr(error, "absolute_path", ())))
        yield Finding(f"Ray refuses the file{f', at {where}' if where else ''}: {message}", "correct the file")


def prepared(cluster: ClusterFile) -> dict[str, Any]:
    """Return the file's content with Ray's defaults. Call it only if `private_parts`.

    Raises Ray's own exception if Ray refuses the file.
    """
    from minimind_ray.on_ray.cluster.private_autoscaler import with_defaults

    return with_defaults(cluster.tree, kuberay=cluster.provider == "kuberay")


def _secrets(cluster: ClusterFile) -> Iterator[Finding]:
    text = cluster.path.read_text(encoding="utf-8")
    for what, pattern in SECRETS.items():
        if pattern.search(text):
            yield Finding(f"the file contains {what}", "remove it, and make a new one: others may have read the file")
    if "aws_credentials" in (cluster.tree.get("provider") or {}):
        yield Finding(
            "the file contains keys: provider.aws_credentials",
            "remove them; use `aws configure` here, and roles on the nodes",
        )


def _prices(cluster: ClusterFile) -> Iterator[Finding]:
    names = {cluster.head, *(node.name for node in cluster.workers)}
    if unknown := sorted(set(cluster.prices) - names):
        yield Finding(
            f"price_per_hour names {unknown[0]}, which is not a node type",
            f"the node types are {', '.join(sorted(names))}",
        )
    elif cluster.cost_at_most() is None:
        missing = sorted(names - set(cluster.prices))
        yield Finding(
            f"no price for {', '.join(missing)}, so the cost cannot be estimated",
            "set metadata.price_per_hour",
            note=True,
        )


def _capacity(cluster: ClusterFile, scale: ScaleConfig) -> Iterator[Finding]:
    """Check that an experiment's workers fit on the largest cluster. Otherwise their placement group waits for ever."""
    if any(node.cpus is None for node in cluster.workers):
        yield Finding(
            "the file does not list the resources of its machines, so it is unknown whether the experiment fits",
            "`minimind-ray doctor` shows the resources once the cluster is up",
            note=True,
        )
        return
    one = f"{scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} GPUs"
    able = [node for node in cluster.workers if node.most and node.fits(scale)]
    if not able:
        shut = [node.name for node in cluster.workers if not node.most and node.fits(scale)]
        fix = (
            f"set max_workers of {shut[0]} above 0"
            if shut
            else "add a node type that has them, or lower scale.cpus_per_worker and scale.gpus_per_worker"
        )
        yield Finding(f"a training worker asks for {one}, and no node type that may start has them", fix)
        return
    fitting, left = 0, cluster.max_workers
    for node in sorted(able, key=lambda node: node.fits(scale), reverse=True):
        count = min(node.most, left)
        fitting, left = fitting + count * node.fits(scale), left - count
    if fitting < scale.fewest:
        yield Finding(
            f"the experiment asks for {scale.fewest} workers of {one}, and the largest cluster has room for {fitting}",
            "raise max_workers (the file's and the node type's), or lower scale.workers",
        )


# --- Files of `ray up` ---


def _commands(tree: Mapping[str, Any], *keys: str) -> str:
    return "\n".join(str(command) for key in keys for command in tree.get(key) or ())


def _setup(cluster: ClusterFile) -> Iterator[Finding]:
    """Check that the setup commands and images give the head, the workers and this machine the same version of Ray."""
    if not private_parts():
        return
    try:
        tree = prepared(cluster)
    except (Exception, SystemExit):
        return
    per_type = [c for node in tree["available_node_types"].values() for c in node.get("worker_setup_commands") or ()]
    head, worker = (
        _commands(tree, "head_setup_commands"),
        "\n".join([_commands(tree, "worker_setup_commands"), *per_type]),
    )
    if "dev0" in head + worker:
        yield Finding(
            "setup_commands are Ray's defaults, which install a development version of Ray",
            "set setup_commands: [bash ~/minimind-ray/cluster/setup.sh]",
        )
        return
    versions: dict[str, str] = {}
    for where, commands in (("the head", head), ("the workers", worker)):
        if re.search(r"pip3? install [^;&|\n]*\bray(\[[\w,]+\])?[\"']?(\s|$|[<>~])", commands):
            yield Finding(f"no version of Ray is pinned for {where}", f"pin it: ray=={client_version()}")
        elif found := re.search(r"\bray(?:\[[\w,]+\])?==([\w.]+)", commands):
            versions[where] = found[1]
        elif "setup.sh" in commands and (pin := _mounted_pin(cluster)):
            versions[where] = pin
    docker = tree.get("docker") or {}
    for where, keys in (("the head", ("head_image", "image")), ("the workers", ("worker_image", "image"))):
        if image := next((docker[key] for key in keys if docker.get(key)), None):
            yield from _image(image, where)
            if found := re.search(r"/ray[\w-]*:(\d+\.\d+\.\d+)", image):
                versions.setdefault(where, found[1])
    yield from _skew(versions)


def _skew(versions: Mapping[str, str]) -> Iterator[Finding]:
    if not versions:
        yield Finding(
            "the file does not say which version of Ray the nodes get",
            "`minimind-ray doctor` compares the versions once the cluster is up",
            note=True,
        )
    everywhere = {**versions, "this machine": client_version()}
    if len(set(everywhere.values())) > 1 and versions:
        said = ", ".join(f"{version} on {where}" for where, version in everywhere.items())
        yield Finding(f"versions of Ray differ: {said}", "install one version everywhere: Ray refuses other versions")


def client_version() -> str:
    """Return the version of Ray on this machine."""
    return importlib.metadata.version("ray")


def _image(image: str, where: str) -> Iterator[Finding]:
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    if "@sha256" not in image and tag.split("-")[0] in ("", "latest", "nightly"):
        yield Finding(
            f"the image of {where}, {image}, may change at any time", "name a version: rayproject/ray:2.60.0-py312"
        )


def _mounted_pin(cluster: ClusterFile) -> str | None:
    """Return Ray's version in the requirements.txt that setup.sh installs; read it where `ray up` copies it from."""
    for remote, local in (cluster.tree.get("file_mounts") or {}).items():
        if remote.rstrip("/").endswith("/cluster"):
            file = Path(local).expanduser() / "requirements.txt"
            if file.is_file() and (
                found := re.search(r"^ray(?:\[[\w,]+\])?==([\w.]+)", file.read_text(), re.MULTILINE)
            ):
                return found[1]
    return None


def _mounts(cluster: ClusterFile) -> Iterator[Finding]:
    for remote, local in (cluster.tree.get("file_mounts") or {}).items():
        path = Path(str(local)).expanduser()
        if not path.exists() and remote != TOKEN:
            yield Finding(
                f"file_mounts: there is no {local} on this machine",
                "run this command and `ray up` in the root of the checkout; if the file is from minimind-ray init, and "
                "minimind-ray was installed again elsewhere, write it again",
            )
        elif path.is_dir() and (heavy := [n for n in (".git", ".venv", "runs") if (path / n).exists()]):
            yield Finding(
                f"file_mounts: {local} contains {heavy[0]}, and Ray hashes all its files, here and on the head",
                "mount only the folders that nodes need, as cluster.yaml does",
                note=True,
            )


def _keys(cluster: ClusterFile) -> Iterator[Finding]:
    auth = cluster.tree.get("auth") or {}
    if cluster.provider == "local" and not auth.get("ssh_user"):
        yield Finding("auth.ssh_user is missing", "name the user who has the same ssh key on all machines")
    if cluster.provider == "local" and not auth.get("ssh_private_key"):
        yield Finding(
            "auth.ssh_private_key is missing, and the head sets up the workers with this key",
            "name a key that only this cluster uses",
        )
    for name in ("ssh_private_key", "ssh_public_key"):
        if not auth.get(name):
            continue
        path = Path(auth[name]).expanduser()
        if not path.is_file():
            make = auth.get("ssh_private_key", auth[name])
            yield Finding(
                f"auth.{name}: there is no {auth[name]}", f"make a pair: ssh-keygen -t ed25519 -N '' -f {make}"
            )
        elif name == "ssh_private_key" and path.stat().st_mode & 0o077:
            yield Finding(f"auth.{name}: others may read {auth[name]}, so ssh refuses it", f"chmod 600 {auth[name]}")
    module, extra = SDKS.get(cluster.provider, (None, None))
    if module and not _installed(module):
        yield Finding(
            f"`ray up` needs {module} for {cluster.provider}, which is not installed here",
            f"pip install 'minimind-ray[{extra}]'",
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _ports(cluster: ClusterFile) -> Iterator[Finding]:
    """Check that the internet can reach only the nodes' ssh port."""
    start = _commands(cluster.tree, "head_start_ray_commands")
    if re.search(r"--dashboard-host[= ][\"']?(0\.0\.0\.0|::)", start) or (not start and cluster.provider in SDKS):
        yield Finding(
            "the dashboard, which starts jobs, listens on every address of the head",
            "set --dashboard-host=127.0.0.1 in head_start_ray_commands; `ray dashboard FILE` makes a tunnel",
        )
    group = (cluster.tree.get("provider") or {}).get("security_group") or {}
    for rule in group.get("IpPermissions") or ():
        ranges = [
            r.get("CidrIp") or r.get("CidrIpv6") for r in (rule.get("IpRanges") or []) + (rule.get("Ipv6Ranges") or [])
        ]
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        if {"0.0.0.0/0", "::/0"} & set(ranges) and ports != (22, 22):
            yield Finding(
                f"the security group opens ports {ports[0]} to {ports[1]} to the world",
                "remove the rule, and use a tunnel",
            )
    own = [
        n
        for n in (cluster.tree.get("available_node_types") or {}).values()
        if "SecurityGroupIds" in (n.get("node_config") or {})
    ]
    if cluster.provider == "aws" and not group and not own:
        yield Finding(
            "Ray will make a security group with ssh open to the world (a key is required)",
            "make a group that admits only your address (cluster/aws-account.cfn); name it in provider.security_group",
            note=True,
        )


def _token(cluster: ClusterFile) -> Iterator[Finding]:
    """Check the cluster's token: without a token, anyone who can reach Ray's port can run code on the cluster."""
    for key, where in (("head_start_ray_commands", "the head"), ("worker_start_ray_commands", "workers")):
        if "RAY_AUTH_MODE=token" not in _commands(cluster.tree, key):
            yield Finding(
                f"token authentication is off on {where}: anyone who can reach Ray's port can run code there",
                f"start Ray with RAY_AUTH_MODE=token in {key}",
            )
    if TOKEN not in (cluster.tree.get("file_mounts") or {}):
        yield Finding("the nodes do not get the cluster's token", f"add to file_mounts: {TOKEN}: {TOKEN}")
        return
    path = Path(cluster.tree["file_mounts"][TOKEN]).expanduser()
    if not path.is_file():
        yield Finding(f"there is no token in {path} yet", "make one: ray get-auth-token --generate")
    elif path.stat().st_mode & 0o077:
        yield Finding(f"other users of this machine can read the token in {path}", f"chmod 600 {path}", note=True)


def _bill(cluster: ClusterFile) -> Iterator[Finding]:
    if cluster.provider == "local":
        return
    minutes = cluster.tree.get("idle_timeout_minutes")
    if minutes is None:
        yield Finding(
            "no idle_timeout_minutes: Ray's default is 5, which is shorter than the time to set up a worker twice",
            "set idle_timeout_minutes: 10",
            note=True,
        )
    elif minutes > LONG_IDLE:
        yield Finding(f"idle machines are kept for {minutes:g} minutes", "set idle_timeout_minutes: 10")
    for node in cluster.workers:
        if node.least:
            yield Finding(
                f"{node.least} {node.name} are paid for all the time",
                "set min_workers: 0, so that Ray starts them only when they are needed",
                note=True,
            )
    if cluster.provider == "aws" and (cluster.tree["provider"]).get("cache_stopped_nodes") is not False:
        yield Finding(
            "machines are stopped but not terminated, so their disks are still paid for",
            "set provider.cache_stopped_nodes: false",
            note=True,
        )


def _nodes(cluster: ClusterFile) -> Iterator[Finding]:
    types: dict[str, Any] = cluster.tree.get("available_node_types") or {}
    head = types.get(cluster.head) or {}
    start = _commands(cluster.tree, "head_start_ray_commands")
    if (head.get("resources") or {}).get("CPU", 1) and "--num-cpus=0" not in start:
        fix = "start it with --num-cpus=0" if cluster.provider == "local" else "set the head's resources: {CPU: 0}"
        yield Finding("trials may run on the head, and the cluster ends if they use up its memory", fix, note=True)
    if cluster.provider == "aws":
        for name, node in types.items():
            if "IamInstanceProfile" not in (node.get("node_config") or {}):
                given = (
                    "Ray gives it a role with all rights for EC2 and S3"
                    if name == cluster.head
                    else "it cannot use the bucket"
                )
                yield Finding(
                    f"{name} has no IamInstanceProfile: {given}", "name a role of cluster/aws-account.cfn", note=True
                )
    spot = {name: node for name, node in types.items() if _is_spot(node.get("node_config") or {})}
    for name, node in spot.items():
        if not any(node.get("resources") == other.get("resources") for n, other in types.items() if n not in spot):
            yield Finding(
                f"{name} has no on-demand type with the same resources",
                "add such a type, for times when no spot machine is available",
                note=True,
            )
    if spot and cluster.provider == "aws" and "spot_first" not in start:
        yield Finding(
            "if AWS refuses a spot request, Ray repeats the request again and again",
            "start the head as cluster.yaml does, with RAY_AUTOSCALER_UTILIZATION_SCORER and autoscaler v1",
            note=True,
        )


def _is_spot(node_config: Mapping[str, Any]) -> bool:
    parameters = node_config.get("azure_arm_parameters") or {}
    scheduling = node_config.get("scheduling") or {}
    pieces = scheduling if isinstance(scheduling, list) else [scheduling]
    return (
        (node_config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        or parameters.get("priority") == "Spot"
        or any(piece.get("preemptible") or piece.get("provisioningModel") == "SPOT" for piece in pieces)
    )


def _examples(cluster: ClusterFile) -> Iterator[Finding]:
    """Find values of the example file that the user has not replaced yet."""
    provider = cluster.tree["provider"]
    addresses = [str(provider.get("head_ip") or ""), *map(str, provider.get("worker_ips") or ())]
    if found := next((a for a in addresses if EXAMPLES.match(a)), None):
        yield Finding(f"{found} is an address of the example", "set head_ip and worker_ips to your machines' addresses")
    if provider.get("project_id") == "my-project":
        yield Finding(
            "provider.project_id is still that of the example",
            "set it to your project's id, and change the service account's address too",
        )
    setup = _commands(cluster.tree, "setup_commands")
    if "MINIMIND_STORAGE=" not in setup:
        yield Finding(
            "MINIMIND_STORAGE is not set: runs stay on the machine that wrote them, and are lost with the machine",
            "set it before setup.sh, to a bucket or to a folder that all machines share",
            note=True,
        )
    elif example := re.search(r"\S*(my-bucket|myaccount)", setup):
        yield Finding(f"the storage is still that of the example: {example[0]}", "name your own storage")
    if provider["type"] != "local":
        return
    if len(set(addresses)) < len(addresses):
        yield Finding("a machine is named twice in head_ip and worker_ips", "name each machine once")
    if "RAY_enable_autoscaler_v2=0" not in _commands(cluster.tree, "head_start_ray_commands"):
        yield Finding(
            "workers would never start: autoscaler v2 does not start workers on your own machines (ray issue 57153)",
            "put RAY_enable_autoscaler_v2=0 before `ray start --head`",
        )


VM_RULES = [_examples, _setup, _mounts, _keys, _token, _ports, _bill, _nodes]


# --- KubeRay ---


def _kuberay_rules(cluster: ClusterFile) -> Iterator[Finding]:
    spec: dict[str, Any] = cluster.tree["spec"]
    groups = {"the head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec.get("workerGroupSpecs") or ()}
    images = {name: group["template"]["spec"]["containers"][0]["image"] for name, group in groups.items()}
    for name, image in images.items():
        yield from _image(image, name)
    if any(image.startswith("REGISTRY/") for image in images.values()):
        yield Finding(
            "the image is still that of the example",
            "build it (`minimind-ray init --cloud kubernetes` prints the command), push it, and name it here",
        )
    if len(set(images.values())) > 1:
        yield Finding(
            f"head and workers have different images: {', '.join(sorted(set(images.values())))}",
            "use one image for all: Ray refuses nodes with another version",
        )
    yield from _skew({"the cluster": str(spec["rayVersion"])} if "rayVersion" in spec else {})
    environment = {e["name"]: e.get("value") for c in _containers(groups.values()) for e in c.get("env") or ()}
    if "my-bucket" in (environment.get("MINIMIND_STORAGE") or ""):
        yield Finding(
            f"the storage is still that of the example: {environment['MINIMIND_STORAGE']}", "name your own storage"
        )
    if (spec.get("authOptions") or {}).get("mode") != "token" and environment.get("RAY_AUTH_MODE") != "token":
        yield Finding(
            "token authentication is off: anyone who can reach Ray's port can run code in the pods",
            f"set spec.authOptions: {{mode: token}} (KubeRay {KUBERAY} or newer)",
        )
    service = spec["headGroupSpec"].get("serviceType", "ClusterIP")
    if service != "ClusterIP":
        yield Finding(
            f"headGroupSpec.serviceType {service} opens the head to other networks",
            "use ClusterIP, and kubectl port-forward",
        )
    if not spec.get("enableInTreeAutoscaling"):
        yield Finding("enableInTreeAutoscaling is off: idle workers stay, and are paid for", "set it to true")
    seconds = (spec.get("autoscalerOptions") or {}).get("idleTimeoutSeconds")
    if seconds is not None and seconds > 60 * LONG_IDLE:
        yield Finding(
            f"idle pods are kept for {seconds / 60:g} minutes",
            "set autoscalerOptions.idleTimeoutSeconds: 600",
        )
    if str((spec["headGroupSpec"].get("rayStartParams") or {}).get("num-cpus")) != "0":
        yield Finding(
            "trials may run on the head, and the cluster ends if they use up its memory",
            'set rayStartParams: {num-cpus: "0"}',
            note=True,
        )
    named = json.loads(environment.get("MINIMIND_NODE_TYPES") or "[]")
    have = [{"CPU": n.cpus or 0, "count": n.most} | ({"GPU": n.gpus} if n.gpus else {}) for n in cluster.workers]
    if named != have:
        yield Finding(
            "MINIMIND_NODE_TYPES does not list the nodes of workerGroupSpecs, so runs that need new nodes are refused",
            f"set MINIMIND_NODE_TYPES of the head to '{json.dumps(have)}'",
        )


def _containers(groups: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for group in groups:
        yield from group["template"]["spec"]["containers"]
