"""How fast data is prepared, and in how much memory, beside the tokenizer alone on the same cores.

    python tests/bench/bench_prepare.py CORPUS_FILES --tokenizer DIR [--megabytes 20 --megabytes 400] [--cpus 2]

Rows of the corpus (pretraining jsonl) are repeated, with a number in front of each, into one file of each size. Each
measurement runs in a process of its own. CPU seconds are those of all processes: they tell more than the wall clock on
a machine that does other work. Memory is the most that any one process held (RSS, without what Ray shares).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from minimind_ray.config.schema import DataConfig
from minimind_ray.data.prepare import prepare
from minimind_ray.data.records import Row, discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer


def make_source(corpus: list[str], path: Path, size: int) -> None:
    rows = (row for source in cycle(discover(corpus)) for row in read_rows(source) if isinstance(row, Row))
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            text = json.dumps({"text": f"{number} {row.value['text']}"}, ensure_ascii=False)
            file.write(text + "\n")
            if file.tell() > size:
                return


class Watch:
    """The most memory and all CPU seconds of this process and its descendants, while inside."""

    def __enter__(self) -> Watch:
        self.memory: dict[int, int] = {}
        self._cpu: dict[int, float] = {}
        self._sample()
        self._before = dict(self._cpu)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self._sample()
        self._stop.set()
        self._thread.join()

    @property
    def cpu(self) -> float:
        return sum(seconds - self._before.get(pid, 0) for pid, seconds in self._cpu.items()) - self._watching

    def _run(self) -> None:
        while not self._stop.wait(1):
            self._sample()
        self._watching = time.thread_time()

    def _sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                info = process.memory_info()
                times = process.cpu_times()
            except psutil.Error:
                continue
            self.memory[process.pid] = max(self.memory.get(process.pid, 0), info.rss - info.shared)
            self._cpu[process.pid] = times.user + times.system


def measure(mode: str, file: str, tokenizer: str, cpus: int) -> dict[str, Any]:
    loaded = Tokenizer.load(tokenizer)
    if mode == "tokenizer":
        (source,) = discover(file)
        with Watch() as watch:
            rows = (row.value["text"] for row in read_rows(source) if isinstance(row, Row))
            reading = 0.0
            tokens = 0
            while True:
                start = time.perf_counter()
                batch = list(islice(rows, 512))
                reading += time.perf_counter() - start
                if not batch:
                    break
                tokens += sum(map(len, loaded._plain.encode_batch_fast(batch, add_special_tokens=False)))
        # Reading and parsing are no part of the tokenizer alone.
        return {"seconds": watch.seconds - reading, "cpu": watch.cpu - reading, "memory": max(watch.memory.values())}
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
    with tempfile.TemporaryDirectory() as cache, Watch() as watch:
        config = DataConfig(train=file, cache_dir=cache, val_fraction=0)
        prepared = prepare("pretrain", config, "train", loaded, **run_units)
    return {
        "seconds": watch.seconds,
        "cpu": watch.cpu,
        "memory": max(watch.memory.values()),
        "units": prepared.made,
        "tokens": prepared.manifest.total("tokens"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, action="append")
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.corpus[0], args.tokenizer, args.cpus)))
        return
    print(f"{'MB':>5} {'':>10} {'seconds':>8} {'MB/s':>6} {'CPU s':>7} {'MB per CPU s':>13} {'memory MB':>10}")
    for size in args.megabytes or [20, 400]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.jsonl"
            make_source(args.corpus, source, size * 10**6)
            for mode in ("tokenizer", "process", "ray"):
                command = [sys.executable, __file__, str(source), "--tokenizer", args.tokenizer]
                command += ["--cpus", str(args.cpus), "--measure", mode]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{size:>5} {mode:>10} {found['seconds']:>8.1f} {size / found['seconds']:>6.1f} "
                    f"{found['cpu']:>7.1f} {size / found['cpu']:>13.2f} {found['memory'] / 1e6:>10.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
