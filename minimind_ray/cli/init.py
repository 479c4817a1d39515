"""`minimind-ray init [DIR]`: write a folder to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Cloud = Literal["aws", "gcp", "azure", "hosts", "kubernetes"]
CLUSTER_FILES: dict[Cloud, str] = {
    "aws": "cluster.yaml",
    "gcp": "cluster/gcp.yaml",
    "azure": "cluster/azure.yaml",
    "hosts": "cluster/local.yaml",
    "kubernetes": "cluster/kuberay.yaml",
}
MOUNTED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "experiments", "cluster")

GITIGNORE = """\
/runs/
/sweeps/
/fetched/
/demo/
/wandb/
/.cache/
/.env
# Large. Not sent with a job to a cluster either: copy it to the cluster's bucket, or delete this line.
/dataset/
"""
README = """\
# {name}

    minimind-ray demo             # the whole path on a small made-up world, in a few minutes
    minimind-ray recipes          # what experiments/ holds; a changed file there is used in place of the shipped one
    minimind-ray run zero         # needs the data and the tokenizer that experiments/zero.yaml names
    minimind-ray tune --sweep dpo --init-from runs/zero/sft --train dataset/dpo.jsonl
    minimind-ray runs             # all runs; then: minimind-ray chat runs/zero/sft

Data goes to dataset/, runs to runs/, sweeps to sweeps/. {cluster}
"""
NO_CLUSTER = "For a cluster: minimind-ray init --cloud aws (gcp, azure, hosts, kubernetes)"
A_CLUSTER = (
    "Edit the lines of cluster.yaml marked EDIT, then:\n`minimind-ray cluster check` and `{start} cluster.yaml`."
)


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="the folder, made if it does not exist")] = Path(),
    cloud: Annotated[Cloud | None, typer.Option(help="also write cluster.yaml for this kind of cluster")] = None,
) -> None:
    """Write a folder to start from: recipes, a cluster file, .gitignore and a README. Overwrites nothing."""
    from minimind_ray.cli.options import require_local
    from minimind_ray.config.shipped import experiments, shipped

    require_local(directory)
    texts = {f"{each.path.relative_to(shipped(''))}": each.path.read_text(encoding="utf-8") for each in experiments()}
    if cloud:
        texts["cluster.yaml"] = cluster_file(cloud)
    if cloud == "aws":
        texts["cluster/aws-account.cfn"] = shipped("cluster/aws-account.cfn").read_text(encoding="utf-8")
    start = "kubectl apply -f" if cloud == "kubernetes" else "ray up"
    more = A_CLUSTER.format(start=start) if cloud else NO_CLUSTER
    texts[".gitignore"] = GITIGNORE
    texts["README.md"] = README.format(name=directory.absolute().name, cluster=more)
    for name, text in texts.items():
        path = directory / name
        if path.exists():
            print(f"kept   {path}" + ("" if path.read_bytes() == text.encode() else " (it differs from ours)"))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote  {path}")
    if cloud == "kubernetes":
        print(f"the command that builds the image: {image_command()}")
    print(f"next: {'' if directory == Path() else f'cd {directory} && '}minimind-ray demo")


def cluster_file(cloud: Cloud) -> str:
    """Return the cluster file for a folder without a checkout: nodes get the software of this installation."""
    import json

    from minimind_ray.config.shipped import PACKAGE, shipped

    name = CLUSTER_FILES[cloud]
    text = shipped(name).read_text(encoding="utf-8")
    for mounted, path in {"minimind_ray": PACKAGE, **{each: shipped(each) for each in MOUNTED}}.items():
        line = f"  ~/minimind-ray/{mounted}: "
        text = text.replace(f"{line}{mounted}\n", f"{line}{json.dumps(str(path))}\n")
    for ours, theirs in {
        "Run from the checkout's root; edit": "Edit",
        f"'.[{cloud}]'": f"'minimind-ray[{cloud}]'",
        name: "cluster.yaml",
    }.items():
        text = text.replace(ours, theirs)
    return text


def image_command() -> str:
    """Return the command that builds the image of the Kubernetes cluster from this installation."""
    from shlex import join

    from minimind_ray.config.shipped import PACKAGE, shipped, version

    docker = ["docker", "build", "-f", str(shipped("cluster/Dockerfile")), "--build-context", f"code={PACKAGE}"]
    return join([*docker, "-t", f"REGISTRY/minimind-ray:{version()}", str(shipped(""))])
