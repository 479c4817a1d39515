"""The validation of a training run: means over the validation packs, and sample texts from the model."""

from __future__ import annotations

import torch

from minimind_ray.config.schema import Config
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.engine import generate
from minimind_ray.model.sampling import Sampling
from minimind_ray.model.transformer import Transformer
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
        self.store, self.tokenizer, self.config = store, tokenizer, config.eval
        self.chat = config.record.rows != "text" and bool(config.eval.prompts)
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

    def samples(self, step: int) -> list[str]:
        """Return texts that the model writes: continuations of the configured prompts, or free text without prompts.

        In stages with conversations a prompt is a user's turn; the line after it is the model's answer.
        """
        prompts = self.config.prompts or [""]
        texts = [prompts[i % len(prompts)] for i in range(self.config.samples)]
        if self.chat:
            ids = [self.tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in texts]
        else:
            ids = [[self.tokenizer.bos_id, *tokens] for tokens in self.tokenizer.encode(texts)]
        sampling = Sampling(
            temperature=self.config.temperature, max_new_tokens=self.config.sample_tokens,
            stop_ids=tuple(self.tokenizer.stop_ids), seed=(step,),
        )  # fmt: skip
        self.model.eval()
        with autocast(self.context.device, self.dtype):
            written = generate(self.model, ids, sampling)
        self.model.train()
        if self.chat:
            return [f"{text}\n{self.tokenizer.answer_text(p, w)}" for text, p, w in zip(texts, ids, written)]
        return [t + self.tokenizer.decode(w, skip_special=True, after=p) for t, p, w in zip(texts, ids, written)]
