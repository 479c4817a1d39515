"""Every measurement, by one command:

    make bench ARGS="training data --models tiny,26m --stages sft,dpo --seconds 20"

Parts: training (ours, MiniMind's scripts and trl side by side), data (preparation beside `tokenizers` alone, reading),
ray (what Ray costs over a plain process), sweep (what a sweep costs over its training), fused (LoRA trials trained
together), checkpoint (the pause of a step), growth (plots). The data are MINIMIND_CORPUS, else the demo's; MiniMind is
the checkout at MINIMIND_REPO, without one it is left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from tests.bench.common import Report, find_data
from tests.bench.training import SIDES, SIZES, STAGES, table

# Imported when they are asked for: training needs no Ray.
PARTS = {
    "training": "training", "data": "data", "ray": "ray_overhead", "sweep": "sweep", "fused": "fused",
    "checkpoint": "checkpoint", "growth": "growth",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directory = os.environ.get
    parser.add_argument("parts", nargs="*", default=["training"], help=f"of {', '.join(PARTS)}; default: training")
    parser.add_argument("--corpus", type=Path, default=directory("MINIMIND_CORPUS"))
    parser.add_argument("--minimind", type=Path, default=directory("MINIMIND_REPO"))
    parser.add_argument("--tokenizer", type=Path, help="default: MiniMind's, else one trained on the corpus")
    parser.add_argument("--report", type=Path, default=Path("bench.json"), help="JSON file; added to if it fits")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side gets")
    group = parser.add_argument_group("training")
    group.add_argument("--stages", default=",".join(STAGES))
    group.add_argument("--models", default="26m", help=f"of {', '.join(SIZES)}")
    group.add_argument("--sides", help=f"default: those of {', '.join(SIDES)} that are here")
    group.add_argument("--seconds", type=float, default=20, help="to time each side in a turn, after the warm-up")
    group.add_argument("--warm-up", type=float, default=3, help="seconds from the first step on; on a GPU 30 or more")
    group.add_argument("--rows", type=int, help="rows to train on")
    group.add_argument("--eager", action="store_true", help="ours not compiled, as short runs are")
    group.add_argument("--pretrain-gb", type=float, default=1.6, help="text of the estimated experiments/zero.yaml")
    group.add_argument("--sft-gb", type=float, default=1.2)
    group = parser.add_argument_group("data")
    group.add_argument("--megabytes", type=int, action="append", help="sizes of the source; default: 20 and 400")
    group.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    group = parser.add_argument_group("ray")
    group.add_argument("--preset", default="small")
    group.add_argument("--steps", type=int, default=30)
    group = parser.add_argument_group("sweep")
    group.add_argument("--base", type=Path, help="an SFT run or model; default: random weights")
    group.add_argument("--pairs", type=int, default=2300)
    group = parser.add_argument_group("fused")
    group.add_argument("--presets", default="small,minimind-3-small")
    group.add_argument("--tokens", default="256,1024", help="of a step")
    group.add_argument("--together", default="2,4,8,16", help="trials in one process")
    group.add_argument("--targets", default="square", help="of LoRA")
    group.add_argument("--trial-steps", type=int, default=12)
    group.add_argument("--separate", type=int, default=4, help="separate runs to take the time of")
    group.add_argument("--places", type=int, default=os.cpu_count(), help="processes side by side")
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--checkpoints", type=int, default=6)
    group.add_argument("--checkpoint-out", type=Path, help="where the run is written; default: a temporary directory")
    group = parser.add_argument_group("growth")
    group.add_argument("--plots", type=Path, default=Path("docs"), help="where the pictures go")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.sides is None:
        here = {"ours": True, "minimind": args.minimind is not None, "trl": importlib.util.find_spec("trl") is not None}
        args.sides = ",".join(side for side in SIDES if here[side])
    args.corpus, args.minimind = (path and path.absolute() for path in map(_path, (args.corpus, args.minimind)))
    report = Report(args.report, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        find_data(args, Path(scratch))
        args.tokenizer = args.tokenizer.absolute()
        for part in args.parts:
            print(f"== {part}", flush=True)
            module = importlib.import_module(f"tests.bench.{PARTS[part]}")
            getattr(module, f"measure_{PARTS[part]}")(args, report, Path(scratch))
    if "training" in report.content:
        print(table(report))


def _path(value: Path | str | None) -> Path | None:
    return Path(value) if value else None


if __name__ == "__main__":
    main()
