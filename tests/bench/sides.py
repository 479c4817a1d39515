"""The processes that are measured: the machine's limits, a base model, our trainer, and trl's.

    python -m tests.bench.sides limits|products|base|prepare|ours|trl '{"setting": ...}'

Trainers print a line of JSON after each step: the useful tokens so far.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from minimind_ray.config.load import load_config
from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.encode import RowEncoder
from minimind_ray.data.records import Reject, discover, read_rows
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import save_model
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.run import begin, prepare_job, run_here
from minimind_ray.train.context import default_device, keep_freed_memory, resolve_precision
from minimind_ray.train.run import RunDirectory
from minimind_ray.train.throughput import measure_matmul_flops


def tell(value: Any) -> None:
    print(json.dumps(value), flush=True)


def limits(seconds: float) -> None:
    """FLOP/s of products and bytes/s, read and written, of copying what no cache holds: each the best in `seconds`."""
    device = default_device()
    found = {
        f"{name}_flops": measure_matmul_flops(device, dtype, seconds)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }
    source = torch.ones(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    tell({"device": device.type, **found, "copy_bytes": 2 * source.nbytes / fastest(seconds, target.copy_, source)})


def products(model: dict[str, Any], vocab_size: int, tokens: int, seconds: float) -> None:
    """Seconds a token takes in the products of tokens and weights alone, forward and backward, in the sizes a step of
    `tokens` has them in: of thin matrices, slower than `limits`' large ones. Without attention's. `frozen`: without
    the weights' gradients."""
    keep_freed_memory()  # As in training: else every product of more than 32 MB pays page faults for its output.
    device, shape = default_device(), ModelConfig(**model).shape(vocab_size)
    dtype = resolve_precision("auto", device)
    c, d, layers = shape.hidden_size, shape.head_dim, shape.num_hidden_layers
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    experts = shape.num_experts or 1
    mlp = (shape.moe_intermediate_size or shape.intermediate_size) if shape.num_experts else shape.intermediate_size
    routed = tokens * (shape.num_experts_per_tok if shape.num_experts else 1) // experts
    # Rows, inputs, outputs, how many.
    sizes = [
        (tokens, c, heads * d, layers), (tokens, c, kv_heads * d, 2 * layers), (tokens, heads * d, c, layers),
        (routed, c, mlp, 2 * layers * experts), (routed, mlp, c, layers * experts), (tokens, c, vocab_size, 1),
    ]  # fmt: skip
    found = {"seconds": 0.0, "frozen": 0.0}
    for rows, inputs, outputs, count in sizes:
        x, weight, dy = (
            torch.randn(*two, device=device, dtype=dtype)
            for two in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        always = fastest(seconds, torch.mm, x, weight.T) + fastest(seconds, torch.mm, dy, weight)
        found["seconds"] += count * (always + fastest(seconds, torch.mm, dy.T, x)) / tokens
        found["frozen"] += count * always / tokens
    tell(found)


def fastest(seconds: float, work: Callable[..., object], *arguments: object) -> float:
    """Seconds of the fastest run within `seconds`, since others may be at work beside, and of one run at least.

    A run before them is not timed. It pays for page faults of memory that no one has written to yet: the first copy
    into 1 GiB takes the kernel seconds, so it was the only one timed, and copying seemed ten times slower than it is.
    """

    def run() -> float:
        start = time.perf_counter()
        work(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    best, end = run(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, run())
    return best


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
        for group in RowEncoder(stage, Tokenizer.load(base), config).encode(read_rows(source))
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
    what = {"limits": limits, "products": products, "base": base, "prepare": prepare, "ours": ours, "trl": trl}
    what[sys.argv[1]](**json.loads(sys.argv[2]))
