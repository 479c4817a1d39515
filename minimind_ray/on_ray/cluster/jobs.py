"""Commands as Ray jobs on a cluster: sent from here with the working directory, followed, and their results fetched."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import secrets
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from minimind_ray.config.errors import UserError
from minimind_ray.data.package import Package
from minimind_ray.on_ray.auth_token import keep_token_private
from minimind_ray.on_ray.cluster.tunnel import tunnel
from minimind_ray.train.bundle import unpack

Client = JobSubmissionClient

AGENT_SECONDS, DASHBOARD_SECONDS = 60.0, 10.0
# To stop a job is to press Ctrl-C: a checkpoint is written first.
STOP_AS_BY_HAND = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "300"}


@contextmanager
def connect(cluster: Path | None) -> Generator[Client]:
    """The jobs of the cluster that a file describes, through a tunnel; without one, of RAY_ADDRESS (http://…).

    Raises:
        UserError: no way there, or another token than the cluster's.
    """
    keep_token_private()
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if cluster:
            # Ray's client would take it for the one that is meant.
            os.environ.pop("RAY_ADDRESS", None)
            with tunnel(cluster) as (address, token):
                yield JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
        else:
            _require_dashboard(os.environ["RAY_ADDRESS"])
            yield JobSubmissionClient()
    except AuthenticationError as error:
        raise UserError(f"the cluster does not take this token: {str(error).splitlines()[0]}") from None
    except ConnectionError as error:
        if cluster:
            raise UserError(f"{cluster}: the head is there, but Ray does not answer on it: ray up {cluster}") from None
        raise UserError(f"the cluster cannot be reached: {str(error).splitlines()[0]}") from None


def _require_dashboard(address: str) -> None:
    """Raises UserError if no Ray dashboard answers at `address`; Ray's client would wait for an answer for ever."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=DASHBOARD_SECONDS) as answer:
            found = "ray_version" in answer.read().decode(errors="replace")
        why = "something else does"
    except urllib.error.HTTPError as error:
        found, why = error.code in (401, 403), str(error)  # It asks for the token first.
    except (OSError, http.client.HTTPException) as error:
        found, why = False, str(error)
    if not found:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray dashboard answers there ({why}); the address is http://HEAD:8265 unless "
            "`ray start --head` was given another --dashboard-port"
        )


def submit(client: Client, command: Sequence[str], metadata: Mapping[str, str], package: Package) -> str:
    """Send the package as the working directory and start `minimind-ray command` there; the job's name.

    Raises:
        UserError: the working directory is too large, or the cluster starts no jobs.
    """
    with TemporaryDirectory() as folder:
        archive = Path(folder, "working_dir.zip")
        package.write(archive)
        return _submit(client, command, metadata, archive)


def _submit(client: Client, command: Sequence[str], metadata: Mapping[str, str], archive: Path) -> str:
    job, deadline = f"{command[0]}-{secrets.token_hex(3)}", time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["minimind-ray", *command]),
                submission_id=job,
                runtime_env={"working_dir": str(archive), "env_vars": STOP_AS_BY_HAND},
                metadata=dict(metadata),
            )
        except ValueError as error:
            raise _too_large(error) from None
        except RuntimeError as error:
            if "status code 413" in str(error):  # Its dashboard takes less than Ray's client would send.
                raise _too_large(str(error).splitlines()[0]) from None
            # A cluster that has just started answers before there is what starts jobs.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the cluster does not start this job: {str(error).splitlines()[0]}") from None
        time.sleep(1)


def _too_large(why: object) -> UserError:
    return UserError(
        f"{Path.cwd()} cannot be sent to the cluster: {str(why).rstrip('.')}. Name in .rayignore what the command does "
        "not need, and put large data into the cluster's storage"
    )


def details(client: Client, job: str) -> JobDetails:
    """What the cluster knows of a job. Raises UserError if there is none of that name."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise UserError(f"the cluster has no job {job}: see minimind-ray jobs") from error


def follow(client: Client, job: str, write: Callable[[str], object]) -> JobDetails:
    """Hand all output of the job to `write`, from its beginning and until it has ended; how it ended.

    Raises:
        UserError: the connection was lost. KeyboardInterrupt leaves the job running, too.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
        return _ended(client, job)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the connection was lost ({error}). If the cluster is still up, job {job} goes on: minimind-ray logs "
            f"{job} shows it. If its head is gone, so is the job: once the cluster is up again, the same command with "
            "--resume goes on from the last checkpoint"
        ) from None


def stop(client: Client, job: str) -> bool:
    """Ask a job to stop, as Ctrl-C does; whether it was running."""
    details(client, job)
    return client.stop_job(job)


def fetch(client: Client, out: str, target: Path) -> list[Path]:
    """Bring what `pack` takes of a job's directory `out` into `target`; the files.

    A job of its own sends them, so it works wherever they lie, and after a job that failed, too.

    Raises:
        UserError: they cannot be read there.
    """
    packer = client.submit_job(entrypoint=shlex.join(["minimind-ray", "pack", out]))
    info = _ended(client, packer)
    text = client.get_job_logs(packer)
    client.delete_job(packer)
    if info.status != "SUCCEEDED":
        why = (text.strip() or info.message or "").splitlines()[-1:]
        raise UserError(f"what the job made, in {out} on the cluster, was not fetched: {' '.join(why)}")
    return unpack(text, target)


def _ended(client: Client, job: str) -> JobDetails:
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.2)
    return info
