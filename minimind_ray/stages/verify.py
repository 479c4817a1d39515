"""Check that a checkpoint is complete, and prove that a run that was killed and resumed gives the same result.

`prove_resume` runs the same training command twice on the demo's data. It lets one run finish, and kills the other with
SIGKILL at random moments and resumes it until it is done. On the same machine, with the same number of workers, both
runs must have the same weights, to the bit, and the same metrics.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import STAGES, StageName
from minimind_ray.data.demo import write_demo
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, model_fingerprint
from minimind_ray.model.lora import is_adapter, load_adapter
from minimind_ray.stages.use import base_of
from minimind_ray.train.checkpoint import STATE, read_state
from minimind_ray.train.ledger import Ledger
from minimind_ray.train.run import RunDirectory, damage, file_sha256, resolve_model


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    detail: str


def check_checkpoint(path: str | Path) -> Iterator[Finding]:
    """Check a checkpoint of a run: its checksums, weights and tokenizer, and the files that a resume needs.

    Raises:
        UserError: there is no checkpoint.
    """
    directory = resolve_model(path, resume=True)
    wrong = damage(directory)
    yield Finding("sums", not wrong, "; ".join(wrong) or "every file is as it was written")
    try:
        base = base_of(directory) if is_adapter(directory) else directory
        model = load_model(base, torch.device("cpu"))
        if base != directory:
            load_adapter(model, directory, model_fingerprint(base))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        broken = [name for name, p in trained.items() if not p.isfinite().all()]
        count = sum(p.numel() for p in trained.values())
        yield Finding("weights", not broken, f"{broken[0]} is not finite" if broken else f"{count:,} finite numbers")
        yield Finding("tokenizer", True, f"{Tokenizer.load(base).vocab_size:,} tokens")
    except UserError as error:
        yield Finding("weights", False, str(error))
        return
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    yield from _check_resume(directory, names)


def _check_resume(directory: Path, names: Sequence[str]) -> Iterator[Finding]:
    try:
        state = read_state(directory)
        with safe_open(directory / "resume" / "optimizer.safetensors", "pt") as file:
            held = set(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        yield Finding("resume", False, f"cannot be resumed: {error}")
        return
    missing = [f"{key}.{name}" for name in names for key in STATE if f"{key}.{name}" not in held]
    complete = f"after step {state['step']}, {state['tokens']:,} tokens; optimizer state complete"
    yield Finding("resume", not missing, f"optimizer.safetensors has no {missing[0]}" if missing else complete)
    try:
        ledger = Ledger(**state["ledger"])
        problem = ledger.problem(state["step"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Finding("ledger", False, f"resume/state.json has no ledger that can be read: {error!r}")
        return
    packs = f"each of {ledger.packs_per_epoch:,} packs" if ledger.packs_per_epoch else "each pack"
    yield Finding("ledger", not problem, problem or f"{packs} exactly once an epoch, up to step {state['step']}")


@dataclass(frozen=True)
class Proof:
    """The result of `prove_resume`.

    `kills` holds the last logged step before each kill, `sha256` the checksum of the uninterrupted run's weights.
    `differences` is empty if the two runs are equal.
    """

    kills: list[int]
    sha256: str
    differences: list[str]


def prove_resume(
    stage: StageName,
    directory: Path,
    *,
    workers: int = 1,
    ray: bool = False,
    kills: int = 3,
    steps: int = 30,
    seed: int = 0,
    settings: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Proof:
    """Train the same run twice under `directory`, kill one of the two `kills` times, and compare them.

    `settings` are `key=value` settings for both runs, such as `data.cache=false`. `say` prints progress.

    Raises:
        UserError: a run failed without being killed, or ended before it could be killed.
    """
    data = write_demo(directory / "data")
    _run(["tokenizer", "train", str(data.rows("pretrain", "train")), "--out", str(directory / "tokenizer"),
          "--vocab-size", "1000"])  # fmt: skip
    host = ["--ray", "--workers", str(workers)] if ray else ["--no-ray"]
    common = [
        "--set", "data.max_seq_len=256", "--set", "data.pack_tokens=512", "--set", "batch.tokens=2048",
        "--set", f"data.cache_dir={directory}/cache", "--set", "eval.samples=0", "--wandb", "off",
        "--set", "train.deterministic=true", "--set", "data.direct_steps=4",
    ]  # fmt: skip

    def command(stage: StageName, out: Path, steps: int) -> list[str]:
        files = ["--train", str(data.rows(stage, "train")), "--val", str(data.rows(stage, "val"))]
        origin = ["--tokenizer", str(directory / "tokenizer"), "--preset", "tiny", "--set", "model.dropout=0.1"]
        if STAGES[stage].needs_base:
            origin = ["--init-from", str(directory / "base")]
        return ["train", stage, *host, *files, *origin, *common, "--max-steps", str(steps), "--out", str(out)]

    often = ["--set", "eval.every=4", "--set", "checkpoint.every=3"]
    often += [word for setting in settings for word in ("--set", setting)]
    if STAGES[stage].needs_base:
        say("training a base model to start from")
        _run(command("pretrain", directory / "base", 4))
    whole, killed = directory / "whole", directory / "killed"
    say(f"training without interruption: {steps} steps")
    _run([*command(stage, whole, steps), *often])
    say(f"training the same run again; it will be killed {kills} times")
    moments = random.Random(seed)
    at: list[int] = []
    for number in range(kills):
        # Choose a step in the next part of the remaining steps. The kill may then hit a step, a validation or the
        # writing of a checkpoint.
        reached = at[-1] if at else 0
        target = reached + moments.randint(1, max(1, (steps - 1 - reached) // (kills - number + 1)))
        resume = ["--resume"] if (killed / "run.json").exists() else []
        at.append(_run_and_kill([*command(stage, killed, steps), *often, *resume], killed, target, moments.random()))
        say(f"killed after step {at[-1]}")
    _run([*command(stage, killed, steps), *often, "--resume"])
    return Proof(at, *compare_runs(whole, killed))


def compare_runs(first: Path, second: Path) -> tuple[str, list[str]]:
    """Return the SHA-256 of a weights file of the first run, and how the second run differs in weights and metrics.

    Compare the weights of the result, and the weights and the optimizer's state of the last checkpoint. If the runs
    differ and their CPUs or numbers of threads do, too, the last difference says so, because it may be the reason.
    """
    differences: list[str] = []
    found: list[tuple[list[str], list[Path], list[tuple[int, str]]]] = []
    for path in (first, second):
        run, result = RunDirectory(path), resolve_model(path)
        last = run.fetch(run.checkpoints()[-1])
        files = [*result.glob("*model.safetensors"), *last.glob("*model.safetensors"), *last.glob("resume/optimizer.*")]
        # Step times and warnings about the disk or the store are not part of the result.
        lines = [
            (line["step"], json.dumps({**line, "timing": 0, "warning": 0}, sort_keys=True)) for line in run.metrics()
        ]
        found.append(([f"{file.parent.name}/{file.name} {file_sha256(file)}" for file in files], files, lines))
    (sums, files, lines), (other_sums, other_files, other_lines) = found
    if sums != other_sums:
        place, (own, other) = next(
            (i, pair) for i, pair in enumerate(zip_longest(sums, other_sums)) if len({*pair}) > 1
        )
        tensors = _differing_tensors(files[place], other_files[place]) if own and other else ""
        differences.append(f"weights: {own} and {other}{tensors}")
    steps, other_steps = ([step for step, _ in each] for each in (lines, other_lines))
    if steps != other_steps:
        differences.append(f"metrics: the runs logged different steps ({len(steps)} and {len(other_steps)} lines)")
    elif unequal := [a[0] for a, b in zip(lines, other_lines) if a != b]:
        differences.append(f"metrics: the first line that differs belongs to step {unequal[0]}")
    cpu, other_cpu = (RunDirectory(path).info().get("cpu") for path in (first, second))
    if differences and cpu != other_cpu:
        differences.append(f"CPU: {cpu}; and {other_cpu}")
    return sums[0].split()[-1], differences


def _differing_tensors(file: Path, other: Path) -> str:
    """Return the end of a sentence that names the tensors that differ; "" if the files cannot be compared."""
    try:
        tensors, others = load_file(file), load_file(other)
    except SafetensorError:
        return ""
    if tensors.keys() != others.keys():
        return f"; only one of the files has {sorted(tensors.keys() ^ others.keys())[0]}"
    unequal = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    if not unequal:
        return "; all tensors are equal"
    first = unequal[0]
    largest = (tensors[first].double() - others[first].double()).abs().max().item()
    return f"; {len(unequal)} of {len(tensors)} tensors differ; the first is {first}, by at most {largest:.1e}"


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    code = "from minimind_ray.cli.main import run; run()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(arguments: Sequence[str]) -> None:
    process = _start(arguments)
    _, errors = process.communicate()
    if process.returncode:
        raise UserError(f"minimind-ray {' '.join(arguments)} failed: {errors.strip().splitlines()[-1:]}")


def _run_and_kill(arguments: Sequence[str], run: Path, target: int, part: float) -> int:
    """Start a run, kill it `part` of a step's time after it logged step `target`, and return the last logged step."""
    process = _start(arguments)
    directory = RunDirectory(run)

    def logged() -> list[float]:
        return [line["timing"]["seconds"] for line in directory.metrics() if line["step"] >= target]

    while process.poll() is None and not logged():
        time.sleep(0.002)
    time.sleep(part * (logged() or [0.0])[-1])
    if process.poll() is not None:
        _, errors = process.communicate()
        raise UserError(
            f"the run ended before it could be killed: {errors.strip()[-300:] or 'it was done'}; raise --steps"
        )
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return max(line["step"] for line in directory.metrics())
