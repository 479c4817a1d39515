"""What all measurements share: the data, the machine and its limits, a watch on memory, and the report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

from minimind_ray.data.demo import write_demo
from minimind_ray.data.records import Row, discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer
from minimind_ray.train.run import git_commit, versions

ROOT = Path(__file__).parents[2]


def find_data(args: Namespace, scratch: Path) -> None:
    """Settle `args.corpus` (a folder with a folder per stage) and `args.tokenizer`: as given, MiniMind's, or made."""
    if args.corpus is None:
        args.corpus = scratch / "demo"
        write_demo(args.corpus)
    if args.tokenizer is None and args.minimind:
        args.tokenizer = args.minimind / "model"
    if args.tokenizer is None:
        args.tokenizer = scratch / "tokenizer"
        texts = (row.value["text"] for s in files(args, "pretrain") for row in read_rows(s) if isinstance(row, Row))
        train_tokenizer(texts).save(args.tokenizer)


def files(args: Namespace, stage: str) -> list[Any]:
    """A stage's training files; LoRA's are those of SFT, which are more."""
    return discover(str(args.corpus / stage.replace("lora", "sft") / "*train*.jsonl"))


def first_rows(args: Namespace, stage: str, count: int, path: Path) -> Path:
    """The first `count` rows of a stage as one file."""
    lines: list[str] = []
    for source in files(args, stage):
        lines += Path(source.path).read_text(encoding="utf-8").splitlines()
    path.write_text("".join(line + "\n" for line in lines[:count]), encoding="utf-8")
    return path


def tokenizer(args: Namespace) -> Tokenizer:
    return Tokenizer.load(args.tokenizer)


def child(*words: object, **options: Any) -> subprocess.Popen[str]:
    """A measurement in a process of its own, so that none inherits another's memory and threads."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)


def ask(*words: object) -> Any:
    """What a child prints as its last line, from JSON."""
    process = child(*words)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, words))}")
    return json.loads(output.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "system": platform.platform()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in fields.items()}
        flags = facts.get("flags", "").split()
        found["cpu"] = facts.get("model name", platform.machine())
        found["cpu_features"] = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    gpus = gpu_query("name")
    if gpus:
        found["gpu"] = gpus[0]
    return found


def gpu_query(field: str) -> list[str]:
    """One field of nvidia-smi for each GPU; nothing without one."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


class GpuMemory:
    """The most that was taken of the first GPU while inside, less what was taken before; bytes, 0 without a GPU."""

    def __enter__(self) -> GpuMemory:
        self.before, self.most = self._used(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.before is not None and not self._stop.wait(0.5):
            self.most = max(self.most, (self._used() or 0) - self.before)

    def _used(self) -> int | None:
        used = gpu_query("memory.used")
        return int(used[0]) * 2**20 if used else None


class Report:
    """All that was measured, in a JSON file. A file of the same machine and commit is added to, so that a large table
    can be taken in pieces."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.path = path
        about = {"machine": machine(), "versions": all_versions(), "commit": git_commit()}
        before = json.loads(path.read_text()) if path.exists() else {}
        self.content = before if before.get("about") == about else {"about": about}
        self.content["command"] = command

    def put(self, part: str, key: str, value: Any) -> None:
        """Keep one result, and write."""
        self.content.setdefault(part, {})[key] = value
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def limits(self, seconds: float) -> dict[str, Any]:
        """The machine's, measured once a report, each limit for `seconds`."""
        if "limits" not in self.content:
            self.content["limits"] = ask("tests.bench.sides", "limits", json.dumps({"seconds": seconds}))
        return self.content["limits"]


def all_versions() -> dict[str, str]:
    found = versions()
    for name in ("transformers", "trl", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Watch:
    """The most memory (RSS without what is shared) of any process and the CPU seconds of all, of this one and its
    descendants, while inside. Samples of memory over time are kept too: (seconds, bytes of all)."""

    def __enter__(self) -> Watch:
        self.memory: dict[int, int] = {}
        self.samples: list[tuple[float, int]] = []
        self._cpu: dict[int, float] = {}
        self._watching = 0.0
        self.started = time.perf_counter()
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
        import psutil

        me, total = psutil.Process(), 0
        for process in [me, *me.children(recursive=True)]:
            try:
                info = process.memory_info()
                times = process.cpu_times()
            except psutil.Error:
                continue
            size = info.rss - info.shared
            total += size
            self.memory[process.pid] = max(self.memory.get(process.pid, 0), size)
            self._cpu[process.pid] = times.user + times.system
        self.samples.append((time.perf_counter() - self.started, total))
