"""The validation of a training run: means over the validation packs, and the model's answers to the fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.distributed as dist

from minimind_ray.config.schema import Config
from minimind_ray.config.stages import RowKind
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.items import Item
from minimind_ray.tasks.measure import run_tasks_of
from minimind_ray.train.answers import Answers, Prompt, answers, fixed_prompts
from minimind_ray.train.context import Context
from minimind_ray.train.evaluate import Evaluation, evaluate, packs_within
from minimind_ray.train.step import Objective, autocast


class Validation:
    """Validates one run's model; each worker takes a share of the packs. `store` is None if the run never validates."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        config: Config,
        context: Context,
        store: PackStore | None,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        pass_tokens: int,
    ) -> None:
        self.model, self.objective, self.context, self.dtype = model, objective, context, dtype
        self.pass_tokens = pass_tokens
        self.store, self.tokenizer, self.config, self.generation = store, tokenizer, config.eval, config.generation
        self.rows: RowKind = config.record.rows
        self.token_bytes_V = torch.from_numpy(tokenizer.token_bytes()).to(context.device)

    def __call__(self) -> Evaluation:
        """Return the result over all workers' packs, the same on every worker."""
        assert self.store
        count = packs_within(self.store, self.config.max_tokens)
        ids = range(count)[self.context.rank :: self.context.world_size]
        packs = (self.store.read([i])[0] for i in ids)
        return evaluate(
            self.model, self.objective, packs, token_bytes_V=self.token_bytes_V,
            device=self.context.device, dtype=self.dtype, pass_tokens=self.pass_tokens,
        )  # fmt: skip

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The run's fixed prompts."""
        assert self.store
        packs, positions = packs_within(self.store, self.config.max_tokens), self.model.shape.max_position_embeddings
        return fixed_prompts(self.config, self.rows, self.tokenizer, self.store, packs, positions)

    def tasks(self) -> tuple[dict[str, float], Sequence[Item] | None]:
        """Run the benchmarks of `eval.tasks` on rank 0; the other workers wait.

        Return the value of each task, the same on every worker, and on rank 0 the items, None if there are no tasks.
        """
        if not self.config.tasks:
            return {}, None
        found: list[dict[str, float]] = [{}]
        items: Sequence[Item] | None = None
        if self.context.rank == 0:
            self.model.eval()
            results = run_tasks_of(
                self.config, self.model, self.tokenizer, self.generation,
                partial(autocast, self.context.device, self.dtype), converses=self.rows != "text",
            )  # fmt: skip
            found[0], items = results.values, results.items
            self.model.train()
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0], items

    def answers(self) -> Answers | None:
        """Return the model's answers to the fixed prompts; None if there are no prompts."""
        if not (self.store and self.config.samples and self.prompts):
            return None
        self.model.eval()
        with autocast(self.context.device, self.dtype):
            found = answers(self.model, self.prompts, self.config, self.rows, self.tokenizer)
        self.model.train()
        return found
