"""How fast data are prepared beside `tokenizers` alone on the same cores, in how much memory; how fast packs are read.

Rows of the corpus (pretraining) are repeated, with a number in front of each, into one file of each size. Each
measurement runs in a process of its own. CPU seconds are those of all processes: they tell more than the wall clock on
a machine that does other work. Memory is the most that any one process held (RSS, without what Ray shares), and by how
much all of them together grew in the second half of the work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from minimind_ray.config.schema import DataConfig
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.prepare import prepare
from minimind_ray.data.records import Row, discover, read_rows
from minimind_ray.data.store import PackStore, epoch_order
from minimind_ray.data.tokenizer import Tokenizer
from tests.bench.common import Report, Watch, ask, files


def measure_data(args: Namespace, report: Report, scratch: Path) -> None:
    print(
        f"{'MB':>5} {'':>10} {'seconds':>8} {'MB/s':>6} {'CPU s':>7} {'of alone':>8} {'memory MB':>10} {'grew MB':>8}"
    )
    for size in args.megabytes or [20, 400]:
        source = scratch / f"source-{size}.jsonl"
        make_source(args, source, size * 10**6)
        found: dict[str, dict[str, float]] = {}
        for mode in ("tokenizers", "process", "ray"):
            settings = {"mode": mode, "file": str(source), "tokenizer": str(args.tokenizer), "cpus": args.cpus}
            found[mode] = one = ask("tests.bench.data", json.dumps(settings))
            alone = found["tokenizers"]["seconds"] / one["seconds"]
            print(
                f"{size:>5} {mode:>10} {one['seconds']:>8.1f} {size / one['seconds']:>6.1f} {one['cpu']:>7.1f} "
                f"{alone:>8.0%} {one['memory'] / 1e6:>10.0f} {one['grew'] / 1e6:>8.0f}",
                flush=True,
            )
        print(f"packs read at {found['process']['read_tokens_per_second'] / 1e6:,.1f} million tokens/s", flush=True)
        report.put("data", f"{size} MB", found)
        source.unlink()


def make_source(args: Namespace, path: Path, size: int) -> None:
    rows = (row for source in cycle(files(args, "pretrain")) for row in read_rows(source) if isinstance(row, Row))
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            text = json.dumps({"text": f"{number} {row.value['text']}"}, ensure_ascii=False)
            file.write(text + "\n")
            if file.tell() > size:
                return


def measure(mode: str, file: str, tokenizer: str, cpus: int) -> dict[str, Any]:
    """In the process of its own."""
    loaded = Tokenizer.load(tokenizer)
    if mode == "tokenizers":
        return alone(file, loaded)
    run_units: dict[str, Any] = {}
    if mode == "ray":
        from minimind_ray.on_ray.prepare import run_units_on_ray
        from minimind_ray.on_ray.session import start_ray

        start_ray(cpus)
        import ray

        # Processes start once in a run, so not in this measurement.
        warm = ray.remote(lambda: __import__("minimind_ray.on_ray.prepare"))
        ray.get([warm.remote() for _ in range(cpus * 2)])
        run_units = {"run_units": run_units_on_ray}
    with tempfile.TemporaryDirectory() as cache:
        with Watch() as watch:
            config = DataConfig(train=file, cache_dir=cache, val_fraction=0)
            prepared = prepare("pretrain", config, "train", loaded, **run_units)
        return {**cost(watch), "tokens": prepared.manifest.total("tokens"), **reading(prepared.path)}


def alone(file: str, tokenizer: Tokenizer) -> dict[str, float]:
    """What `tokenizers` takes for the ids of all texts. Reading and parsing them is not counted."""
    (source,) = discover(file)
    with Watch() as watch:
        texts = (row.value["text"] for row in read_rows(source) if isinstance(row, Row))
        apart = 0.0
        while True:
            start = time.perf_counter()
            batch = list(islice(texts, 512))
            apart += time.perf_counter() - start
            if not batch:
                break
            tokenizer.encode(batch)
    found = cost(watch)
    return {**found, "seconds": found["seconds"] - apart, "cpu": found["cpu"] - apart}


def cost(watch: Watch) -> dict[str, float]:
    half = [size for at, size in watch.samples if watch.seconds / 2 <= at <= watch.seconds]
    grew = half[-1] - half[0] if half else 0
    return {"seconds": watch.seconds, "cpu": watch.cpu, "memory": max(watch.memory.values()), "grew": grew}


def reading(path: str) -> dict[str, float]:
    """An epoch's packs in their order, read and made batches of."""
    store = PackStore(path)
    start, tokens = time.perf_counter(), 0
    for id in epoch_order(store.row_groups, 0, 0).tolist():
        tokens += len(batch_from_packs(store.read([id])).tokens_N)
    return {"read_tokens_per_second": tokens / (time.perf_counter() - start)}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
