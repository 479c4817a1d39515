"""Run commands on a cluster as Ray jobs: `minimind-ray --cluster FILE COMMAND…`. List, follow and stop these jobs."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.flags import config_from_flags, require_stage
from minimind_ray.cli.missing import require_inputs
from minimind_ray.cli.recipes import require_recipe, take
from minimind_ray.cli.version import print_version
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
        help="run the command as a job on the cluster that was started with `ray up FILE`: send the working directory "
        "there, show the output here, and fetch the results at the end",
        show_default=False,
    ),
]
Ship = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="send this file or folder with the job, even if .gitignore names it or it looks like a secret; may be "
        "repeated",
        show_default=False,
    ),
]
Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=print_version, is_eager=True, help="print the versions and the device", show_default=False
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="the job's name, see `minimind-ray jobs`")]

JOB_COMMANDS = ("jobs", "logs", "stop", "pack", "cluster")  # run on this machine, and may use --cluster
# These run on this machine, and refuse --cluster.
LOCAL_COMMANDS = ("config", "chat", "import", "export", "lora", "init", "recipes")
# RAY_ADDRESS=http://… sends these commands to the cluster, as it does for `ray job`. Only --cluster sends the others.
RAY_COMMANDS = ("train", "tune", "run", "data", "demo", "doctor")
FETCHED = "fetched.json"
MOST_NAMED = 8


def main(context: typer.Context, cluster: ClusterFile = None, ship: Ship = None, version: Version = False) -> None:
    """Train small language models from jsonl on Ray: pretrain, SFT, LoRA, DPO."""
    name = context.invoked_subcommand
    if cluster and name in LOCAL_COMMANDS:
        raise UserError(f"{name} runs on this machine only: leave --cluster out")
    by_address = name in RAY_COMMANDS and os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://"))
    if name not in (*JOB_COMMANDS, *LOCAL_COMMANDS) and (cluster or by_address):
        _send(context, cluster, _command(sys.argv[1:]), list(map(str, ship or ())))
        raise typer.Exit
    if ship:
        raise UserError(f"--ship sends files with a job, but {name} is not sent as a job: leave --ship out")


def jobs(
    context: typer.Context, json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False
) -> None:
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
        if j.start_time:  # A job that failed before it began has no start time.
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
    """Stop a job as Ctrl-C stops a command: it finishes the current step and writes a checkpoint."""
    cluster = _cluster(context)
    from minimind_ray.on_ray.cluster.jobs import connect
    from minimind_ray.on_ray.cluster.jobs import stop as stop_job

    with connect(cluster) as client:
        running = stop_job(client, job)
    watch = f"{_program(cluster)} logs {job}"
    print(f"{job} was asked to stop; to watch it end: {watch}" if running else f"{job} has ended")


def pack(out: Annotated[str, typer.Argument(metavar="DIR", help="a run, a sweep, or a recipe's directory")]) -> None:
    """Print the files of DIR that `logs` fetches, without models, as one line that `logs` understands."""
    from minimind_ray.config.paths import output_path
    from minimind_ray.train.bundle import pack as packed

    print(packed(output_path(out)))


def _send(context: typer.Context, cluster: Path | None, command: Sequence[str], ship: Sequence[str]) -> None:
    """Check the command, send it, and follow it."""
    params = _parse(context, command)
    metadata = _metadata(command[0], params)
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
    """Say how many files are sent, and which secrets and links are not."""
    text = f"sending {len(sent.files):,} files of this directory, {sent.size:,} bytes"
    for kind, names in {"secrets": sent.secrets, "links that lead out of it": sent.links}.items():
        if names:
            more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            text += f"; not sent ({kind}): {', '.join(names[:MOST_NAMED])}{more}"
    return f"{text}; --ship PATH sends such a file" if sent.secrets or sent.links else text


def _watch(client: Client, job: str, cluster: Path | None) -> None:
    """Show the job's output until the job has ended, fetch its results, and exit with an error if the job failed."""
    from json import dumps

    from minimind_ray.on_ray.cluster.jobs import fetch, follow

    try:
        info = follow(client, job, _write)
    except KeyboardInterrupt:
        program = _program(cluster)
        print(f"\n{job} continues without this terminal. Watch it: {program} logs {job}; stop it: {program} stop {job}")
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
    # Ray's message repeats the end of the log, which was shown already.
    reason, _, _ = (info.message or "").partition(", last available logs")
    print(f"job {job}: {info.status}" + (f": {reason}" if info.status == "FAILED" else ""))
    if info.status != "SUCCEEDED":
        raise typer.Exit(130 if info.status == "STOPPED" else info.driver_exit_code or 1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _command(arguments: list[str]) -> list[str]:
    """Return the arguments from the command's name on, without --cluster and --ship, which come before it."""
    while arguments and arguments[0].startswith("-"):
        arguments = arguments[1 if "=" in arguments[0] else 2 :]
    return arguments


def _parse(context: typer.Context, command: Sequence[str]) -> dict[str, Any]:
    """Return the command's parameters. Parsing reports misspelt options here, and shows --help without a cluster."""
    inner: Any = context
    rest = list(command)
    while hasattr(inner.command, "commands"):
        name, found, rest = inner.command.resolve_command(inner, rest)
        inner = found.make_context(name, list(rest), parent=inner)
    return inner.params


def _metadata(name: str, params: dict[str, Any]) -> dict[str, str]:
    """Check the command's config, and return the job's metadata: the config and the directory of the results."""
    from minimind_ray.config.load import to_yaml

    if params.get("dry_run"):
        return {}
    paths = [*(params.get("config") or []), params.get("sweep") if name == "tune" else None, params.get("recipe")]
    for path in map(Path, filter(None, paths)):
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{path} is outside of the working directory; only files in it can be sent to the cluster")
    if name == "train":
        params["stage"] = require_stage(params["stage"], "train")
        files = [take("config", each) for each in params["config"] or []]
        config = config_from_flags(params["stage"], files, params["set_"] or [], params)
        if not params["resume"]:
            require_inputs(config)
        return {"out": config.out.replace("{stage}", config.stage), "config": to_yaml(config)}
    if name == "eval" and params["out"]:
        raise UserError("eval --out would write into the job's copy of the working directory: leave --out out")
    if name == "demo":
        return {"out": params["out"]}
    if name == "tune" and params["resume"]:
        return {"out": str(params["resume"])}
    if name == "tune":
        if not params["sweep"]:
            require_stage(params["stage"], "tune")
        from minimind_ray.cli.tune import plan_of
        from minimind_ray.config.flags import without_unset

        plan = plan_of(without_unset(params))
        require_inputs(plan.base, [axis.key for axis in plan.axes])
        return {"out": str(params["out"] or Path("sweeps") / plan.base.stage), "config": to_yaml(plan.base)}
    if name == "run":
        from minimind_ray.stages.recipe import read_recipe

        recipe = read_recipe(take("recipe", require_recipe(params["recipe"])))
        return {"out": str(params["out"] or recipe.out or f"runs/{recipe.name}")}
    return {}


def _target(out: str) -> Path:
    """Return the local directory for the results: a relative path itself; for others fetched/ and their last part."""
    path = Path(check_location(out))
    if ".." in path.parts:
        raise UserError(f"{out} leads out of the working directory, so its results cannot be fetched: change --out")
    return path if "://" not in out and not path.is_absolute() else Path("fetched") / path.name


def _check_target(out: str) -> Path:
    """Return the local directory for the results.

    Raises:
        UserError: the directory exists, but does not hold earlier results of the same `out`.
    """
    target = _target(out)
    if not target.exists():
        return target
    if not (target / FETCHED).exists():
        raise UserError(
            f"{target} exists on this machine, and the cluster's results would be written there: choose another --out"
        )
    if _normalized(other := str(_fetched(target).get("out"))) != _normalized(out):
        raise UserError(f"{target} holds the results of {other}, not of {out}: move or delete it")
    return target


def _normalized(out: str) -> str:
    """Return the path or URL without a slash at its end, which a shell's completion may add."""
    return out.rstrip("/") if "://" in out else str(Path(out))


def _fetched(target: Path) -> dict[str, Any]:
    """Return the record of the results fetched into a directory; {} if there is none."""
    from minimind_ray.config.reading import read_json

    return read_json(target / FETCHED) if (target / FETCHED).exists() else {}


def _remove(target: Path, names: set[str]) -> None:
    """Remove files of an earlier fetch that no longer exist on the cluster, such as the trials of an earlier sweep."""
    from minimind_ray.train.run import inside

    for name in filter(inside, names):
        (target / name).unlink(missing_ok=True)
        with suppress(OSError):  # The folder holds other files.
            for folder in Path(name).parents:
                (target / folder).rmdir()


def _cluster(context: typer.Context) -> Path | None:
    cluster = context.find_root().params["cluster"]
    if not cluster and not os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        raise UserError(
            f"which cluster? use minimind-ray --cluster FILE {context.info_name}, or set RAY_ADDRESS to the address of "
            "the cluster's dashboard, such as http://127.0.0.1:8265"
        )
    _check_cluster(cluster)
    return cluster


def _check_cluster(cluster: Path | None) -> None:
    """Report a missing or wrong cluster file, before the slow import of Ray."""
    from minimind_ray.config.cluster import read_cluster

    if cluster:
        read_cluster(cluster)


def _program(cluster: Path | None) -> str:
    """Return the beginning of a command for the same cluster."""
    return f"minimind-ray --cluster {cluster}" if cluster else "minimind-ray"
