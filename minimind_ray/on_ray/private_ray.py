"""What Ray's documented interface does not offer and a correct run needs. Used only where `private_parts` says so.

Without this module signals of a whole process group reach Ray's processes too; a wrong RAY_ADDRESS is refused after
minutes, not seconds; a run that waits does not name the other programs; and what a killed trial held is found through
Ray's dashboard (see `session.free_left_groups`).
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


@contextmanager
def own_sessions() -> Generator[None]:
    """While inside, Ray starts its processes in sessions of their own, and installs no handler of SIGTERM.

    A closed terminal, or `kill -TERM -GROUP`, would end Ray's processes before a run has written its checkpoint. They
    still end when the command does, however it ends: Ray has asked the kernel for it.
    """
    before = utils.set_sigterm_handler, services.ConsolePopen
    utils.set_sigterm_handler = lambda sigterm_handler: None
    services.ConsolePopen = partial(services.ConsolePopen, start_new_session=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = before


def require_head(address: str) -> None:
    """Raises UserError if what answers at `address` is no Ray head, or one with another token."""
    try:
        found = canonicalize_bootstrap_address(address)  # Of `auto`, too.
    except (ConnectionError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {one_line(error)}") from None
    if not found:  # `local`: Ray starts one here.
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


def jobs() -> list[dict[str, Any]]:
    """The programs on the cluster, with JobID, DriverPid, DriverIPAddress, Entrypoint and IsDead."""
    return state.job_table()


def draining() -> bool:
    """Whether notice was given that this process's node will be taken away."""
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def groups_of_dead_actors() -> Iterator[PlacementGroup]:
    """The placement groups that actors of this driver made and left when they were killed."""
    job = ray.get_runtime_context().get_job_id()
    for data in state._connect_and_get_accessor().get_placement_group_table():  # pyright: ignore[reportPrivateUsage]
        group = PlacementGroupTableData.FromString(data)
        left = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        if left and group.creator_job_id.hex() == job and group.state != PlacementGroupTableData.REMOVED:
            yield PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
