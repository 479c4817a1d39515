"""Every measurement, by one command:

    make bench ARGS="training data --models tiny,26m --stages sft,dpo --seconds 20"

Parts: training (ours, MiniMind's scripts and trl side by side), data (preparation beside `tokenizers` alone, reading),
ray (what Ray costs over a plain process), sweep (what a sweep costs over its training), fused (LoRA trials trained
together), checkpoint (the pause of a step), growth (plots), coverage (whether the intervals of simulated sweeps hold),
tasks (benchmarks beside lm-eval's own `hf` model).
Training on a cluster whose workers and nodes are killed has a command of its own: python -m tests.bench.soak --help.
Healthy and broken runs for `diagnose` are trained by python -m tests.bench.diagnose --help.

The data are those in the folder MINIMIND_CORPUS, else the demo's. MiniMind is the checkout at MINIMIND_REPO; without
one it is left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.bench.common import Report, find_data
from tests.bench.training import SIDES, SIZES, STAGES, table

# Imported when they are asked for: training needs no Ray.
PARTS = {
    "training": "training", "data": "data", "ray": "ray_overhead", "sweep": "sweep", "fused": "fused",
    "checkpoint": "checkpoint", "growth": "growth", "coverage": "coverage", "tasks": "tasks",
}  # fmt: skip


def main(words: list[str]) -> None:
    """Measure the parts that the command line's `words` name, into the report; print what was found."""
    args = parse(words)
    report = Report(args.report, words)
    with tempfile.TemporaryDirectory() as scratch:
        if set(args.parts) - {"coverage"}:  # Simulated sweeps need no data.
            find_data(args, Path(scratch))
            args.tokenizer = args.tokenizer.absolute()
        for part in args.parts:
            print(f"== {part}", flush=True)
            module = importlib.import_module(f"tests.bench.{PARTS[part]}")
            getattr(module, f"measure_{PARTS[part]}")(args, report, Path(scratch))
    if "training" in args.parts:
        print(table(report))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line's parts and options."""
    parser = argparse.ArgumentParser(
        prog="tests.bench",
        usage="python -m tests.bench [PART ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    corpus, minimind = (os.environ.get(name) or None for name in ("MINIMIND_CORPUS", "MINIMIND_REPO"))
    add = parser.add_argument
    add("parts", nargs="*", default=["training"], metavar="PART", help=f"{', '.join(PARTS)}; default: training")
    add("--corpus", type=Path, default=corpus, help="folder; default: MINIMIND_CORPUS")
    add("--minimind", type=Path, default=minimind, help="checkout; default: MINIMIND_REPO")
    add("--tokenizer", type=Path, help="default: MiniMind's, else one trained on the corpus")
    add("--report", type=Path, default=Path("bench.json"), help="JSON file; added to if the machine and commit are its")
    add("--rounds", type=int, default=2, help="turns of each side, in training and ray; default: %(default)s")
    add("--cpus", type=int, default=len(os.sched_getaffinity(0)), help="for data, ray and growth; default: all")
    add = parser.add_argument_group("training").add_argument
    add("--stages", type=names_of(STAGES), default=",".join(STAGES), help="default: %(default)s")
    add("--models", type=names_of(SIZES), default="26m", help=f"of {', '.join(SIZES)}; default: %(default)s")
    add("--sides", type=names_of(SIDES), help=f"of {', '.join(SIDES)}; default: those that are here")
    add("--seconds", type=float, default=20, help="to time a side in a turn, after the warm-up; default: %(default)s")
    add(
        "--warm-up",
        type=float,
        default=3,
        help="seconds before that; on a GPU 30 or more; default: %(default)s",
    )
    add("--probe-seconds", type=float, default=1, help="to time each product and copy; default: %(default)s")
    add("--rows", type=int, help="rows to train on; default: 8192, of dpo 256")
    add("--eager", action="store_true", help="ours not compiled, as short runs are")
    add(
        "--pretrain-gb",
        type=float,
        default=1.6,
        help="text for the estimate of zero.yaml; default: %(default)s",
    )
    add("--sft-gb", type=float, default=1.2, help="conversations for it; default: %(default)s")
    add = parser.add_argument_group("data").add_argument
    add("--megabytes", type=int, action="append", help="size of the source, once or more; default: 20 and 400")
    add = parser.add_argument_group("ray").add_argument
    add("--preset", default="small", help="model; default: %(default)s")
    add("--steps", type=int, default=30, help="of a run, three or more; default: %(default)s")
    add = parser.add_argument_group("sweep").add_argument
    add("--base", type=Path, help="an SFT run or model; default: random weights")
    add("--pairs", type=int, default=2300, help="to train on at most; default: %(default)s")
    add("--betas", default="0.02,0.05,0.1,0.3", help="a trial for each and each seed; default: %(default)s")
    add("--seeds", type=int, default=2, help="default: %(default)s")
    add = parser.add_argument_group("fused").add_argument
    add("--presets", default="small,minimind-3-small", help="models; default: %(default)s")
    add("--tokens", default="256,1024", help="of a step; default: %(default)s")
    add("--together", default="2,4,8,16", help="trials in one process; default: %(default)s")
    add("--targets", default="square", help="of LoRA; default: %(default)s")
    add("--trial-steps", type=int, default=12, help="default: %(default)s")
    add("--separate", type=int, default=4, help="separate runs to time; default: %(default)s")
    add("--places", type=int, default=os.cpu_count(), help="processes side by side; default: one for each core")
    add = parser.add_argument_group("checkpoint").add_argument
    add("--checkpoint-preset", default="minimind-3-small", help="model; default: %(default)s")
    add("--checkpoints", type=int, default=6, help="to time; default: %(default)s")
    add("--checkpoint-out", type=Path, help="where the run is written; default: a temporary directory")
    add = parser.add_argument_group("growth").add_argument
    add("--growth-model", choices=SIZES, default="26m", help="default: %(default)s")
    add("--workers", default="1,2,4", help="numbers of workers; default: %(default)s")
    add("--worker-steps", type=int, default=4, help="steps to time for each of them; default: %(default)s")
    add("--lengths", default="32,64,128,256,512,1024,2048,4096", help="of documents, tokens; default: %(default)s")
    add("--packs", default="512,1024,2048,4096,8192,16384", help="their sizes, tokens; default: %(default)s")
    add("--point-seconds", type=float, default=4, help="to time a document length or pack size; default: %(default)s")
    add("--plots", type=Path, default=Path("docs"), help="where the pictures go; default: %(default)s")
    add = parser.add_argument_group("coverage").add_argument
    add("--sweeps", type=int, default=200, help="to simulate of each kind; default: %(default)s")
    add("--draws", type=int, default=500, help="of the bootstrap; default: %(default)s")
    add = parser.add_argument_group("tasks").add_argument
    add("--task-models", type=names_of(SIZES), default="26m", help=f"of {', '.join(SIZES)}; default: %(default)s")
    add("--task-items", type=int, default=50, help="items of each kind; default: %(default)s")
    add("--task-batch", type=int, default=16, help="requests at a time of hf's second turn; default: %(default)s")
    args = parser.parse_args(words)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.sides is None:
        here = {"ours": True, "minimind": args.minimind is not None, "trl": importlib.util.find_spec("trl") is not None}
        args.sides = ",".join(side for side in SIDES if here[side])
    if "minimind" in args.sides and args.minimind is None:
        parser.error("--sides minimind: say where its checkout is, with --minimind or MINIMIND_REPO")
    args.corpus, args.minimind = (path and path.absolute() for path in (args.corpus, args.minimind))
    return args


def names_of(known: Iterable[str]) -> Callable[[str], str]:
    """Return the check of an option that takes some of the `known` names, with commas between."""

    def check(value: str) -> str:
        if unknown := set(value.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return value

    return check


if __name__ == "__main__":
    main(sys.argv[1:])
