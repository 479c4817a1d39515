"""Say which validation examples belong together.

Examples of one cluster are not independent: the pieces of a split text, pairs that share a prompt, questions about the
same passage. The statistics of a sweep therefore resample clusters, not examples. A cluster is, by default,

    text            the document
    conversation    the conversation
    pair            the prompt, which several pairs may share

or, with `eval.cluster: FIELD`, all rows with the same value of this field. The id of a cluster is a hash, so equal
documents in different files are one cluster. Packs and their keys in the cache do not depend on clusters: the ids lie
in a column beside the packs of a validation set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_ray.config.errors import UserError
from minimind_ray.data.columns import Column
from minimind_ray.data.fields import is_absent
from minimind_ray.data.files import join, locate
from minimind_ray.data.formats import Conversation, Pair
from minimind_ray.data.pack import Group, list_column
from minimind_ray.data.records import Row
from minimind_ray.data.store import column_schema

CLUSTER = Column("cluster", "document", "int64")
"""The id of each document's cluster. Both documents of a pair have the same."""

SCHEMA = column_schema(CLUSTER)


def cluster_of(row: Row, item: str | Conversation | Pair, field: str | None) -> int:
    """Return the id of a row's cluster: 63 bits of a hash. `item` is the row's content; `field` is `eval.cluster`.

    Raises:
        UserError: the row has no such field.
    """
    if field:
        value = row.value.get(field)
        if is_absent(value):
            raise UserError(
                f"{row.file}:{row.line}: the row has no field {field}, which eval.cluster names; add it to every "
                "validation row, or leave eval.cluster out"
            )
        return _hash(json.dumps(value, sort_keys=True))
    if isinstance(item, str):
        return _hash(item)
    shared = item if isinstance(item, Conversation) else item.prompt
    return _hash(json.dumps([shared.messages, shared.tools]))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def clusters_name(field: str | None) -> str:
    """Return the name of a file of clusters, for `eval.cluster` `field`."""
    return f"clusters-{_hash(field):016x}.parquet" if field else "clusters.parquet"


def clusters_file(store: str, field: str | None) -> str:
    """Return the path or URL of the column CLUSTER of a prepared validation set."""
    return join(store, clusters_name(field))


def clusters_table(packs: Sequence[Sequence[Group]]) -> pa.Table:
    """Return the clusters of packs' documents, one list for each pack."""
    rows = [[np.array([document.cluster for group in pack for document in group], CLUSTER.dtype)] for pack in packs]
    return pa.Table.from_arrays([list_column(rows, SCHEMA.field(CLUSTER.name).type.value_type)], schema=SCHEMA)


def count_clusters(file: str) -> int:
    """Return the number of different clusters in a file."""
    filesystem, path = locate(file)
    lists = pq.read_table(path, filesystem=filesystem)[CLUSTER.name]
    return len(lists.combine_chunks().values.unique())
