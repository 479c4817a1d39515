"""Commands on a cluster, as Ray jobs: `minimind-ray --cluster FILE COMMAND…`, and `jobs`, `logs`, `stop`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.flags import config_from_flags
from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import check_location

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minimind_ray.data.package import Package
    from minimind_ray.on_ray.cluster.jobs import Client

ClusterFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="run the command on the cluster that was started with `ray up FILE`, as a job: the working directory is "
        "sent there, output comes here, and so do results in the end",
        show_default=False,
    ),
]
Ship = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="send this file or folder with the job, though .gitignore names it or it looks like a secret; may be "
        "repeated",
        show_default=False,
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="the job's name, see `minimind-ray jobs`")]

# They are about jobs themselves, or about what is here.
ABOUT_JOBS = ("jobs", "logs", "stop", "pack", "cluster")
STAY_HERE = ("config", "chat", "import", "export", "lora")
# What RAY_ADDRESS=http://… sends, as it does for `ray job`; other commands are sent by --cluster alone.
ON_RAY = ("train", "tune", "run", "data", "demo", "doctor")
FETCHED = "fetched.json"
NAMED = 8


def everywhere(context: typer.Context, cluster: ClusterFile = None, ship: Ship = None) -> None:
    """Train small language models from jsonl on Ray: pretrain, SFT, LoRA, DPO."""
    name = context.invoked_subcommand
    if cluster and name in STAY_HERE:
        raise UserError(f"{name} runs here: leave --cluster out")
    by_address = name in ON_RAY and os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://"))
    if name not in (*ABOUT_JOBS, *STAY_HERE) and (cluster or by_address):
        _send(context, cluster, _command(sys.argv[1:]), list(map(str, ship or ())))
        raise typer.Exit
    if ship:
        raise UserError(f"--ship sends files with a job, and {name} is none here: leave --ship out")


def jobs(context: typer.Context, json: Annotated[bool, typer.Option("--json", help="a JSON list")] = False) -> None:
    """List the cluster's jobs, latest first."""
    cluster = _cluster(context)
    from datetime import datetime

    from minimind_ray.on_ray.cluster.jobs import connect
    from minimind_ray.sweep.text import duration_text

    with connect(cluster) as client:
        found = sorted((j for j in client.list_jobs() if j.submission_id), key=lambda j: -(j.start_time or 0))
    if json:
        from json import dumps

        facts = [
            {
                "job": j.submission_id, "state": j.status, "command": j.entrypoint, "started": j.start_time,
                "ended": j.end_time, "out": (j.metadata or {}).get("out"), "message": j.message,
            }
            for j in found
        ]  # fmt: skip
        print(dumps(facts, ensure_ascii=False, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("job", "state", "started", "took", "command", box=None, header_style="dim")
    for j in found:
        started, took = "-", "-"
        if j.start_time:  # What failed before it began has none.
            began = j.start_time / 1000
            started = f"{datetime.fromtimestamp(began):%d %b %H:%M}"
            took = duration_text((j.end_time or datetime.now().timestamp() * 1000) / 1000 - began)
        cells = (str(j.submission_id), str(j.status), started, took)
        table.add_row(*cells, Text(j.entrypoint))
    Console(highlight=False, soft_wrap=True).print(table if found else "no jobs")


def logs(context: typer.Context, job: Job) -> None:
    """Show a job's output from its beginning, follow it to its end, and fetch its results."""
    cluster = _cluster(context)
    from minimind_ray.on_ray.cluster.jobs import connect, details

    with connect(cluster) as client:
        details(client, job)
        _watch(client, job, cluster)


def stop(context: typer.Context, job: Job) -> None:
    """Stop a job as Ctrl-C does: after the current step, with a checkpoint."""
    cluster = _cluster(context)
    from minimind_ray.on_ray.cluster.jobs import connect
    from minimind_ray.on_ray.cluster.jobs import stop as stop_job

    with connect(cluster) as client:
        running = stop_job(client, job)
    print(f"{job} was asked to stop; watch it end: {_ours(cluster)} logs {job}" if running else f"{job} has ended")


def pack(out: Annotated[str, typer.Argument(metavar="DIR", help="a run, a sweep, or a recipe's directory")]) -> None:
    """Print what is worth fetching of DIR, without models: one line that `logs` understands."""
    from minimind_ray.config.paths import output_path
    from minimind_ray.train.bundle import pack as packed

    print(packed(output_path(out)))


def _send(context: typer.Context, cluster: Path | None, command: Sequence[str], ship: Sequence[str]) -> None:
    """Check the command, send it, and follow it."""
    params = _parse(context, command)
    metadata = _plan(command[0], params)
    if out := metadata.get("out"):
        _check_target(out)
    _check_cluster(cluster)
    from minimind_ray.data.package import package

    sent = package(Path.cwd(), ship)
    print(_summary(sent), flush=True)
    from minimind_ray.on_ray.cluster.jobs import connect, submit

    with connect(cluster) as client:
        job = submit(client, command, metadata, sent)
        print(f"job {job}: minimind-ray {' '.join(command)}\nCtrl-C leaves it running", flush=True)
        _watch(client, job, cluster)


def _summary(sent: Package) -> str:
    """What is sent, and which secrets and links stay here."""
    text = f"sending {len(sent.files):,} files of this directory, {sent.size:,} bytes"
    for what, names in {"secrets": sent.secrets, "links that lead out of it": sent.links}.items():
        if names:
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            text += f"; not sent, as {what}: {', '.join(names[:NAMED])}{more}"
    return f"{text} (--ship PATH sends one)" if sent.secrets or sent.links else text


def _watch(client: Client, job: str, cluster: Path | None) -> None:
    """Show the job's output until it has ended, and bring home what it made; exits as the job did."""
    from json import dumps

    from minimind_ray.on_ray.cluster.jobs import fetch, follow

    try:
        info = follow(client, job, _write)
    except KeyboardInterrupt:
        ours = _ours(cluster)
        print(f"\n{job} continues without this terminal. Watch it: {ours} logs {job}; stop it: {ours} stop {job}")
        raise typer.Exit(130) from None
    if out := (info.metadata or {}).get("out"):
        target = _check_target(out)
        before = _fetched(target).get("files", [])
        if files := fetch(client, out, target):
            names = [str(file.relative_to(target)) for file in files]
            _remove(target, set(before) - set(names))
            note = {"job": job, "out": out, "files": names}
            (target / FETCHED).write_text(dumps(note) + "\n", encoding="utf-8")
            pages = [file for file in files if file.name == "report.html"]
            print(f"fetched {len(files)} files into {target}" + "".join(f"; report: {page}" for page in pages))
    # Ray's message repeats the end of the log, which was shown.
    why, _, _ = (info.message or "").partition(", last available logs")
    print(f"job {job}: {info.status}" + (f": {why}" if info.status == "FAILED" else ""))
    if info.status != "SUCCEEDED":
        raise typer.Exit(130 if info.status == "STOPPED" else info.driver_exit_code or 1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _command(arguments: list[str]) -> list[str]:
    """The arguments without our own option, which stands before the command."""
    while arguments and arguments[0].startswith("-"):
        arguments = arguments[1 if "=" in arguments[0] else 2 :]
    return arguments


def _parse(context: typer.Context, command: Sequence[str]) -> dict[str, Any]:
    """The command's parameters: what is misspelt is told here, and --help needs no cluster."""
    inner: Any = context
    rest = list(command)
    while hasattr(inner.command, "commands"):
        name, found, rest = inner.command.resolve_command(inner, rest)
        inner = found.make_context(name, list(rest), parent=inner)
    return inner.params


def _plan(name: str, params: dict[str, Any]) -> dict[str, str]:
    """What the job's record says beside the command: the config, checked here, and where its results lie."""
    from minimind_ray.config.load import to_yaml

    if params.get("dry_run"):
        return {}
    paths = [*(params.get("config") or []), params.get("sweep") if name == "tune" else None, params.get("recipe")]
    for path in map(Path, filter(None, paths)):
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{path} is outside of the working directory; only files in it can be sent to the cluster")
    if name == "train":
        config = config_from_flags(params["stage"], map(Path, params["config"] or []), params["set_"] or [], params)
        return {"out": config.out.replace("{stage}", config.stage), "config": to_yaml(config)}
    if name == "eval" and params["out"]:
        raise UserError("eval --out would write into the job's copy of the working directory: leave it out")
    if name == "demo":
        return {"out": params["out"]}
    if name == "tune" and params["resume"]:
        return {"out": str(params["resume"])}
    if name == "tune":
        from minimind_ray.cli.tune import plan_of
        from minimind_ray.config.flags import without_unset

        plan = plan_of(without_unset(params))
        return {"out": str(params["out"] or Path("sweeps") / plan.base.stage), "config": to_yaml(plan.base)}
    if name == "run":
        from minimind_ray.stages.recipe import read_recipe

        recipe = read_recipe(params["recipe"])
        return {"out": str(params["out"] or recipe.out or f"runs/{recipe.name}")}
    return {}


def _target(out: str) -> Path:
    """Where results come to: the same relative path here; of others the last part, under fetched/."""
    path = Path(check_location(out))
    if ".." in path.parts:
        raise UserError(f"{out} leads out of the working directory, where its results would come: choose another --out")
    return path if "://" not in out and not path.is_absolute() else Path("fetched") / path.name


def _check_target(out: str) -> Path:
    """The target, which is not there, or holds what was fetched of the same directory."""
    target = _target(out)
    if not target.exists():
        return target
    if not (target / FETCHED).exists():
        raise UserError(
            f"{target} here is of this machine, and the cluster's results would come there: choose another --out"
        )
    if _plain(other := str(_fetched(target).get("out"))) != _plain(out):
        raise UserError(f"{target} holds what was fetched of {other}, not of {out}: move or delete it")
    return target


def _plain(out: str) -> str:
    """Without what a shell's completion adds."""
    return out.rstrip("/") if "://" in out else str(Path(out))


def _fetched(target: Path) -> dict[str, Any]:
    """What was fetched into a directory; {} where nothing was."""
    from minimind_ray.config.reading import read_json

    return read_json(target / FETCHED) if (target / FETCHED).exists() else {}


def _remove(target: Path, names: set[str]) -> None:
    """Remove what was fetched before and is no more, such as the trials of an earlier sweep."""
    from minimind_ray.train.run import inside

    for name in filter(inside, names):
        (target / name).unlink(missing_ok=True)
        with suppress(OSError):  # Other files are there.
            for folder in Path(name).parents:
                (target / folder).rmdir()


def _cluster(context: typer.Context) -> Path | None:
    cluster = context.find_root().params["cluster"]
    if not cluster and not os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        raise UserError(
            f"which cluster? minimind-ray --cluster FILE {context.info_name}, or set RAY_ADDRESS to its dashboard, "
            "such as http://127.0.0.1:8265"
        )
    _check_cluster(cluster)
    return cluster


def _check_cluster(cluster: Path | None) -> None:
    """A file that is not there, or is none, is told before Ray is imported."""
    from minimind_ray.config.cluster import read_cluster

    if cluster:
        read_cluster(cluster)


def _ours(cluster: Path | None) -> str:
    return f"minimind-ray --cluster {cluster}" if cluster else "minimind-ray"
