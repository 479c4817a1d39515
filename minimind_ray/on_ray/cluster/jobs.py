"""Send commands to a cluster as Ray jobs, together with the working directory; follow and stop them; fetch results."""

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
# Ray stops a job by SIGINT, as Ctrl-C does, and waits up to 300 s, so that the run can write a checkpoint.
STOP_BY_SIGINT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "300"}


@contextmanager
def connect(cluster: Path | None) -> Generator[Client]:
    """Inside, give a client for the jobs of a cluster: through a tunnel for a `cluster` file, otherwise at RAY_ADDRESS.

    Raises:
        UserError: the cluster cannot be reached, or refuses this machine's token.
    """
    keep_token_private()
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if cluster:
            # Ray's client would use RAY_ADDRESS instead of the tunnel's address.
            os.environ.pop("RAY_ADDRESS", None)
            with tunnel(cluster) as (address, token):
                yield JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
        else:
            _require_dashboard(os.environ["RAY_ADDRESS"])
            yield JobSubmissionClient()
    except AuthenticationError as error:
        raise UserError(f"the cluster refuses this machine's token: {str(error).splitlines()[0]}") from None
    except ConnectionError as error:
        if cluster:
            raise UserError(f"{cluster}: the head runs, but Ray does not answer there: ray up {cluster}") from None
        raise UserError(f"the cluster cannot be reached: {str(error).splitlines()[0]}") from None


def _require_dashboard(address: str) -> None:
    """Raise UserError if no Ray dashboard answers at `address`; Ray's client would wait for an answer for ever."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=DASHBOARD_SECONDS) as answer:
            found = "ray_version" in answer.read().decode(errors="replace")
        why = "the server there is not Ray's"
    except urllib.error.HTTPError as error:
        found, why = error.code in (401, 403), str(error)  # A dashboard that requires a token.
    except (OSError, http.client.HTTPException) as error:
        found, why = False, str(error)
    if not found:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray dashboard answers there ({why}); the address is http://HEAD:8265 unless "
            "`ray start --head` was given another --dashboard-port"
        )


def submit(client: Client, command: Sequence[str], metadata: Mapping[str, str], package: Package) -> str:
    """Send the package as the working directory, and start `minimind-ray command` in it. Return the job's name.

    Raises:
        UserError: the working directory is too large, or the cluster does not start the job.
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
                runtime_env={"working_dir": str(archive), "env_vars": STOP_BY_SIGINT},
                metadata=dict(metadata),
            )
        except ValueError as error:
            raise _too_large(error) from None
        except RuntimeError as error:
            if "status code 413" in str(error):  # The dashboard's limit is lower than the limit of Ray's client.
                raise _too_large(str(error).splitlines()[0]) from None
            # A cluster that has just started may answer before its agent, which starts jobs, is ready: try again.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the cluster does not start this job: {str(error).splitlines()[0]}") from None
        time.sleep(1)


def _too_large(why: object) -> UserError:
    return UserError(
        f"{Path.cwd()} cannot be sent to the cluster: {str(why).rstrip('.')}. List in .rayignore the files that the "
        "command does not need, and put large data into the cluster's storage"
    )


def details(client: Client, job: str) -> JobDetails:
    """Return the cluster's information about a job. Raises UserError if the cluster has no job with this name."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise UserError(f"the cluster has no job {job}: see minimind-ray jobs") from error


def follow(client: Client, job: str, write: Callable[[str], object]) -> JobDetails:
    """Pass all output of a job to `write`, from its beginning until the job ends. Return the ended job's information.

    KeyboardInterrupt leaves the job running.

    Raises:
        UserError: the connection was lost. The job may still run.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
        return _ended(client, job)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the connection was lost ({error}). If the cluster is still up, job {job} continues: minimind-ray logs "
            f"{job} shows its output. If the cluster's head has ended, the job has ended too: start the cluster again, "
            "and send the same command with --resume to continue from the last checkpoint"
        ) from None


def stop(client: Client, job: str) -> bool:
    """Ask a job to stop, as Ctrl-C does. Return whether it was running."""
    details(client, job)
    return client.stop_job(job)


def fetch(client: Client, out: str, target: Path) -> list[Path]:
    """Copy the files of a job's directory `out`, as `pack` chooses them, into `target`. Return their paths.

    A separate job on the cluster sends the files. So the copy works for every storage, and also after a failed job.

    Raises:
        UserError: the cluster cannot read the files.
    """
    packer = client.submit_job(entrypoint=shlex.join(["minimind-ray", "pack", out]))
    info = _ended(client, packer)
    text = client.get_job_logs(packer)
    client.delete_job(packer)
    if info.status != "SUCCEEDED":
        why = (text.strip() or info.message or "").splitlines()[-1:]
        raise UserError(f"the job's results, in {out} on the cluster, were not fetched: {' '.join(why)}")
    return unpack(text, target)


def _ended(client: Client, job: str) -> JobDetails:
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.2)
    return info
