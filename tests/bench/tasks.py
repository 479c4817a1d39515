"""What benchmarks take: our model class for lm-eval beside lm-eval's own `hf`, on the same directory and requests.

Requests of four kinds, made here, with lengths as in ARC and MMLU: choices of several tokens after a question, choices
of one letter after a question with its choices, whole texts, and answers to write. Both sides compute in float32, and
take turns. `hf` has its default, one request at a time, and a batch of `--task-batch`. The figures are CPU seconds,
which other jobs on the machine change little.
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from minimind_ray.config.schema import GenerationConfig, ModelConfig
from minimind_ray.model.checkpoint import load_model, save_model
from minimind_ray.model.transformer import Transformer
from tests.bench.common import Report, files, tokenizer
from tests.bench.training import model_settings


def measure_tasks(args: Namespace, report: Report, scratch: Path) -> None:
    """Print for each model and kind of request the seconds of each side, and how many times as fast ours is."""
    texts = [
        json.loads(line)["text"]
        for source in files(args, "pretrain")
        for line in Path(source.path).read_text("utf-8").splitlines()[:2000]
    ]
    for name in args.task_models.split(","):
        folder = scratch / f"tasks-{name}"
        vocabulary = tokenizer(args)
        torch.manual_seed(0)
        shape = ModelConfig.model_validate(model_settings(name)).shape(vocabulary.vocab_size)
        save_model(Transformer(shape), vocabulary, folder)
        lms = sides(folder, args.task_batch)
        for kind in METHODS:
            requests = requests_of(kind, texts, args.task_items)
            rounds = [{side: timed(lm, kind, requests) for side, lm in lms.items()} for _ in range(args.rounds)]
            found = {side: min(each[side] for each in rounds) for side in lms}
            ratios = {side: seconds / found["ours"] for side, seconds in found.items() if side != "ours"}
            shown = ", ".join(f"{side} {found[side]:.2f} s ({ratio:.1f} times)" for side, ratio in ratios.items())
            print(f"{name} {kind}: {args.task_items} items, ours {found['ours']:.2f} s; {shown}", flush=True)
            report.put("tasks", f"{name} {kind}", {"seconds": found, "ratio": ratios})


def sides(folder: Path, batch: int) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    from minimind_ray.data.tokenizer import Tokenizer
    from minimind_ray.tasks.lm import RaggedLM

    model = load_model(folder).eval()
    return {
        "ours": RaggedLM(model, Tokenizer.load(folder), GenerationConfig(), nullcontext),
        "hf": HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1),
        f"hf in batches of {batch}": HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch),
    }


def requests_of(kind: str, texts: list[str], count: int) -> list[Instance]:
    """Requests for `count` items: a question of about 60 characters, and choices of about 15."""
    r = random.Random(0)

    def piece(size: int) -> str:
        text = "".join(r.choice(texts) for _ in range(1 + size // 20))
        return text[: r.randint(size // 2, size * 3 // 2)]

    found: list[Instance] = []
    for _ in range(count):
        context, choices = f"问题：{piece(60)}\n答案：", [piece(15) for _ in range(4)]
        if kind == "letters":
            context = "\n".join([context, *map("{}. {}".format, "ABCD", choices), "答案："])
            choices = list("ABCD")
        if kind in ("choices", "letters"):
            arguments = [(context, choice) for choice in choices]
        else:
            arguments = [(piece(400),) if kind == "texts" else (context, {"until": ["。"], "max_gen_toks": 32})]
        found += [Instance(METHODS[kind], {}, each, index) for index, each in enumerate(arguments)]
    return found


METHODS: dict[str, Any] = {
    "choices": "loglikelihood", "letters": "loglikelihood", "texts": "loglikelihood_rolling",
    "answers": "generate_until",
}  # fmt: skip


def timed(lm: Any, kind: str, requests: list[Instance]) -> float:
    """The CPU seconds that the model takes for the requests."""
    answer = getattr(lm, METHODS[kind])
    answer(requests[:4], disable_tqdm=True)
    begin = time.process_time()
    answer(requests, disable_tqdm=True)
    return time.process_time() - begin
