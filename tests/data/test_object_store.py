"""Object stores over the wire, on loopback: S3 by moto's server, the Hugging Face Hub by a few routes of its own."""

from __future__ import annotations

import gzip
import json
import logging
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.data import prepare as module
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.columns import Column
from minimind_ray.data.prepare import prepare
from minimind_ray.data.records import Row, discover, read_rows
from minimind_ray.data.storage import require_writable
from minimind_ray.data.store import PackStore, write_column
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer
from minimind_ray.train.run import resolve_model

pytestmark = pytest.mark.slow

TEXTS = [f"the fox number {i}" for i in range(100)]
CONTENT = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.FileSystem]:
    """An S3 server with one bucket, `bucket`, found by the environment as a real one would be."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3 = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0]
    s3.create_dir("bucket")
    yield s3
    s3.delete_dir_contents("bucket")  # Buckets outlive their server.
    server.stop()


def put(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def test_from_bucket_to_packs_in_a_bucket(
    bucket: fs.FileSystem, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 1000)
    put(bucket, "bucket/data/a b/1.jsonl", CONTENT)
    put(bucket, "bucket/data/2.jsonl", CONTENT + b"{\n")
    put(bucket, "bucket/data/README.txt", b"no rows")
    config = DataConfig(
        train="s3://bucket/data", cache_dir="s3://bucket/cache", max_seq_len=32, pack_tokens=64, val_fraction=0.2
    )
    for split in ("train", "val"):
        prepared = prepare("pretrain", config, split, tokenizer)
        assert prepared.path.startswith("s3://bucket/cache/datasets/")
        assert prepared.made > 2
        total = prepared.manifest.total
        assert total("rows") == total("kept") + total("rejected") + total("held_out") == 201
        store = PackStore(prepared.path, prepared.columns)
        assert sum(len(pack.lengths) for pack in store) == store.n_documents == total("kept")
        assert [pack.id for pack in store.read([store.n_packs - 1, 0])] == [store.n_packs - 1, 0]
        again = prepare("pretrain", config, split, tokenizer)
        assert (again.made, again.path) == (0, prepared.path)
    assert len({cluster for pack in store for cluster in pack.columns[CLUSTER].tolist()}) > 5
    (inner,) = [
        path for path in _files(bucket, "bucket/cache/datasets") if _content(bucket, path).startswith(b'{"file')
    ]
    assert json.loads(_content(bucket, inner))["file"] == "s3://bucket/data/2.jsonl"
    assert not [path for path in _files(bucket, "bucket/cache") if path.endswith(".tmp")]

    column, file = Column("lengths again", "document", "float32"), "s3://bucket/cache/lengths.parquet"
    write_column(store, column, file, (pack.lengths for pack in store))
    for pack in PackStore(store.path, {column: file}):
        assert pack.columns[column].tolist() == pack.lengths.tolist()


def test_every_kind_of_file_in_a_bucket(bucket: fs.FileSystem) -> None:
    lines = "\n".join(TEXTS).encode()
    contents = {
        "x.json": json.dumps([{"text": text} for text in TEXTS]).encode(), "x.csv": b"text\n" + lines, "x.txt": lines,
        "x.txt.gz": gzip.compress(lines),
    }  # fmt: skip
    for name, content in contents.items():
        put(bucket, f"bucket/kinds/{name}", content)
    sources = discover("s3://bucket/kinds")
    assert len(sources) == len(contents)
    for source in sources:
        assert [row.value["text"] for row in read_rows(source) if isinstance(row, Row)] == TEXTS


def _files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    return [info.path for info in infos if info.type == fs.FileType.File]


def _content(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def test_globs_and_what_is_missing_in_a_bucket(bucket: fs.FileSystem, tokenizer: Tokenizer, tmp_path: Path) -> None:
    put(bucket, "bucket/data/x/1.jsonl", CONTENT)
    put(bucket, "bucket/data/2.jsonl", CONTENT)
    assert [s.path for s in discover("s3://bucket/**/*.jsonl")] == [
        "s3://bucket/data/2.jsonl", "s3://bucket/data/x/1.jsonl",
    ]  # fmt: skip
    assert [s.size for s in discover("s3://bucket/data/[12].jsonl")] == [len(CONTENT)]
    for path in ("s3://bucket/none.jsonl", "s3://bucket/*.parquet"):
        with pytest.raises(UserError, match=re.escape(path)):
            discover(path)
    for use in (discover, Tokenizer.load, resolve_model, partial(require_writable, probe=False)):
        with pytest.raises(UserError, match="^s3://nobucket/data: the bucket nobucket does not exist$"):
            use("s3://nobucket/data")
    require_writable("s3://bucket/new", probe=False)
    assert _files(bucket, "bucket") == ["bucket/data/2.jsonl", "bucket/data/x/1.jsonl"]
    with pytest.raises(UserError, match="^s3://bucket/none is not a tokenizer directory"):
        Tokenizer.load("s3://bucket/none")
    config = DataConfig(train="s3://bucket/data/2.jsonl", cache_dir="s3://nobucket/cache")
    with pytest.raises(UserError, match="data.cache_dir s3://nobucket/cache: cannot be used"):
        prepare("pretrain", config, "train", tokenizer)
    local = config.model_copy(update={"cache_dir": str(tmp_path)})
    assert prepare("pretrain", local, "train", tokenizer).manifest.sources == {"s3://bucket/data/2.jsonl": len(CONTENT)}


FILES = {"a/1.jsonl": CONTENT, "2.jsonl": CONTENT[: len(CONTENT) // 2]}


class Hub(BaseHTTPRequestHandler):
    """The routes that reading one data set takes."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/datasets/me/poems" or path.startswith("/api/datasets/me/poems/revision/"):
            self.reply(json.dumps({"id": "me/poems", "sha": "0" * 40, "siblings": []}).encode())
        elif path.startswith("/api/datasets/me/poems/tree/"):
            entries: list[dict[str, Any]] = [{"type": "directory", "path": "a", "oid": "1" * 40, "size": 0}]
            entries += [{"type": "file", "path": p, "oid": str(len(c)), "size": len(c)} for p, c in FILES.items()]
            self.reply(json.dumps(entries).encode())
        elif path.startswith("/datasets/me/poems/resolve/"):
            content = FILES[path.removeprefix("/datasets/me/poems/resolve/").partition("/")[2]]
            self.reply(content)
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815

    def reply(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            content = content[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"etag"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.HfFileSystem
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", partial(real, endpoint=endpoint, token=False))
    try:
        sources = discover("hf://datasets/me/poems")
        assert [s.path for s in sources] == ["hf://datasets/me/poems/2.jsonl", "hf://datasets/me/poems/a/1.jsonl"]
        rows = list(read_rows(sources[1]))
        assert [row.value["text"] for row in rows if isinstance(row, Row)] == TEXTS
        assert [s.path for s in discover("hf://datasets/me/poems/a/*.jsonl")] == ["hf://datasets/me/poems/a/1.jsonl"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
