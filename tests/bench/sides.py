"""The processes that are measured: the machine's limits, a base model, our trainer, and trl's.

    python -m tests.bench.sides limits|base|prepare|ours|trl '{"setting": ...}'

Trainers print a line of JSON after each step: the useful tokens so far.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import torch

from minimind_ray.config.load import load_config
from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.encode import encode_rows
from minimind_ray.data.records import Reject, discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import save_model
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.run import begin, prepare_job, resolve_paths, run_here
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.run import RunDirectory
from minimind_ray.train.throughput import measure_matmul_flops


def tell(value: Any) -> None:
    print(json.dumps(value), flush=True)


def limits() -> None:
    """FLOP/s of matrix products and bytes/s of copying what no cache holds, each the best within some seconds."""
    device = default_device()
    found = {
        f"{name}_flops": measure_matmul_flops(device, dtype, 2.0)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }
    source = torch.ones(2**28, device=device)  # 1 GiB
    target, fastest = torch.empty_like(source), math.inf
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    tell({"device": device.type, **found, "copy_bytes": 2 * source.nbytes / fastest})


def base(tokenizer: str, model: dict[str, Any], out: str) -> None:
    """Random weights for the stages that begin with some."""
    torch.manual_seed(0)
    loaded = Tokenizer.load(tokenizer)
    save_model(Transformer(ModelConfig(**model).shape(loaded.vocab_size)), loaded, out)
    tell(out)


def prepare(stage: str, settings: dict[str, Any]) -> None:
    """Our packs and reference log-probabilities, into the cache."""
    start = time.perf_counter()
    prepare_job(resolve_paths(load_config(stage, overrides=settings)))
    tell({"seconds": time.perf_counter() - start})


def ours(stage: str, settings: dict[str, Any]) -> None:
    append = RunDirectory.append

    def append_and_tell(run: RunDirectory, name: str, line: dict[str, Any]) -> None:
        append(run, name, line)
        if name == "metrics.jsonl":
            tell(line["tokens"])

    RunDirectory.append = append_and_tell
    job = prepare_job(resolve_paths(load_config(stage, overrides=settings)))
    begin(job, resume=False)
    run_here(job)


def trl(stage: str, rows: str, base: str, max_seq_len: int, rank: int, out: str) -> None:
    """SFTTrainer on packs (also for pretraining and LoRA), DPOTrainer with the reference computed first.

    SFT rows come tokenized, with the mask of what the loss counts on, as our encoder gives them: what trl's own
    preparation takes is not in its figures. On a CPU a forward pass takes one sequence of 1,024 tokens and a step 4 of
    them: with trl's defaults (8 in one pass) it runs at less than half of that. On a GPU its defaults stand.
    """
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Tell(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "num_tokens" in logs:
                tell(logs["num_tokens"])

    device = default_device()
    cpu = device.type == "cpu"
    common: dict[str, Any] = {
        "output_dir": out, "use_cpu": cpu, "bf16": resolve_precision("auto", device) is torch.bfloat16,
        "max_steps": 10**6, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "max_length": 1024,
    }  # fmt: skip
    if cpu and stage != "dpo":
        common |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tools: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(base), "callbacks": [Tell()]}
    if stage == "dpo":
        from trl import DPOConfig, DPOTrainer

        data = load_dataset("json", data_files=rows, split="train")
        options = DPOConfig(**common, precompute_ref_log_probs=True)
        DPOTrainer(model=model, args=options, train_dataset=data, **tools).train()
        return
    from trl import SFTConfig, SFTTrainer

    config = load_config(stage, overrides={"data.max_seq_len": max_seq_len}).data
    documents = [
        group[0]
        for source in discover(rows)
        for group in encode_rows(stage, read_rows(source), Tokenizer.load(base), config)
        if not isinstance(group, Reject)
    ]
    columns = {"input_ids": [d.tokens.tolist() for d in documents]}
    if stage != "pretrain":
        columns["completion_mask"] = [d.weights.tolist() for d in documents]
    if stage == "lora":
        from peft import LoraConfig

        tools["peft_config"] = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "o_proj"])
    options = SFTConfig(**common, packing=True, completion_only_loss=stage != "pretrain")
    SFTTrainer(model=model, args=options, train_dataset=Dataset.from_dict(columns), **tools).train()


if __name__ == "__main__":
    what = {"limits": limits, "base": base, "prepare": prepare, "ours": ours, "trl": trl}
    what[sys.argv[1]](**json.loads(sys.argv[2]))
