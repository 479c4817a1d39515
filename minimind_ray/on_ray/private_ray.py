"""Functions that need private parts of Ray (see versions.py). They are used only if `versions.private_parts` is true.

Without this module, four things are different:

- A signal to the whole process group also reaches Ray's processes.
- A wrong RAY_ADDRESS is refused after minutes instead of seconds.
- The line about a waiting run does not name the other programs on the cluster.
- The placement groups of killed trials are found through Ray's dashboard (see `session.free_left_groups`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
import ray
from ray._private import services, utils
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray.core.generated.gcs_pb2 import (
    JobTableData,  # pyright: ignore[reportAttributeAccessIssue] generated
    PlacementGroupTableData,  # pyright: ignore[reportAttributeAccessIssue] generated
)
from ray.core.generated.gcs_service_pb2 import (
    CheckAliveRequest,  # pyright: ignore[reportAttributeAccessIssue] generated
)
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.util.placement_group import PlacementGroup

from minimind_ray.config.errors import UserError
from minimind_ray.data.files import one_line

HEAD_SECONDS = 10.0
RAY_INTERNAL = "_ray_internal_"
"""How the namespaces of Ray's own programs begin."""


@contextmanager
def own_sessions() -> Generator[None]:
    """Inside, Ray starts its processes in separate sessions, and installs no handler for SIGTERM.

    In the command's session, a closed terminal or `kill -TERM -GROUP` would end Ray's processes before a run has
    written its checkpoint. In separate sessions they still end with the command, even if it is killed, because Ray asks
    the kernel to end them.
    """
    before = utils.set_sigterm_handler, services.ConsolePopen
    utils.set_sigterm_handler = lambda sigterm_handler: None
    services.ConsolePopen = partial(services.ConsolePopen, start_new_session=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = before


def require_head(address: str) -> None:
    """Raise UserError if no Ray head answers at `address`, or if the head has another token."""
    try:
        found = canonicalize_bootstrap_address(address)  # Also finds the address for `auto`.
    except (ConnectionError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {one_line(error)}") from None
    if not found:  # The address is `local`: Ray starts on this machine.
        return
    opened: Any = init_grpc_channel(found)
    with opened as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=HEAD_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(
                    f"RAY_ADDRESS={address}: the cluster does not take this machine's token: set RAY_AUTH_TOKEN to the "
                    "cluster's token, or put it into ~/.ray/auth_token"
                ) from None
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray head answers there ({error.code().name}); the address is "
                "HEAD:6379 unless `ray start --head` was given another port"
            ) from None


def other_jobs() -> list[Any]:
    """Return the running programs on the cluster as `JobTableData`, without this program and Ray's own."""
    own = ray.get_runtime_context().get_job_id()
    accessor = state._connect_and_get_accessor()  # pyright: ignore[reportPrivateUsage]
    table = accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    return [
        job
        for job in map(JobTableData.FromString, table)
        if not (job.is_dead or job.job_id.hex() == own or job.config.ray_namespace.startswith(RAY_INTERNAL))
    ]


def draining() -> bool:
    """Whether this process's node has a preemption notice."""
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def groups_of_dead_actors() -> Iterator[PlacementGroup]:
    """Yield the placement groups of this driver's actors that were killed."""
    job = ray.get_runtime_context().get_job_id()
    for data in state._connect_and_get_accessor().get_placement_group_table():  # pyright: ignore[reportPrivateUsage]
        group = PlacementGroupTableData.FromString(data)
        left = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        if left and group.creator_job_id.hex() == job and group.state != PlacementGroupTableData.REMOVED:
            yield PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
