"""A model of ours as lm-eval sees it. Its results equal those of lm-eval's own `hf` model, and take less time.

lm-eval turns the items of a task into requests: the log-likelihood of a continuation after a context, the
log-likelihood of a whole text, or text to generate. `RaggedLM` answers them with `log_likelihoods` and the decoding
engine. Tokens, windows, truncation and stop strings follow lm_eval/models/huggingface.py (version 0.4.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import GenerationConfig
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.engine import Engine
from minimind_ray.model.sampling import Sampling
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.likelihood import Query, log_likelihoods

ANSWER_TOKENS = 256
"""The longest answer in tokens if a task does not say."""
SLOTS = 32
"""The number of answers that are generated at the same time."""


class RaggedLM(TemplateLM):
    """A model with its tokenizer, for lm-eval's `evaluate`.

    `generation` are the model's own settings: as with `hf`, its repetition penalty counts. `autocast` makes the context
    in which the model computes. `progress` is called with the number of requests that are answered, and the number of
    all requests.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        generation: GenerationConfig,
        autocast: Callable[[], AbstractContextManager[Any]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        assert not model.training, "dropout would be on"
        self.model, self.ids, self.generation = model, tokenizer, generation
        self.autocast, self.progress = autocast, progress
        self.max_length = model.shape.max_position_embeddings
        self._prefix = tokenizer.decode([tokenizer.bos_id])

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context begins with."""
        return self.ids.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for lm-eval's caches."""
        return self.ids.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template's text, which lm-eval notes in its results."""
        return self.ids.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation up to the beginning of the answer. The first message may have `tools`."""
        if not add_generation_prompt:
            raise UserError("a task with gen_prefix begins the answer itself, which --chat does not support: leave it")
        tools = chat_history[0].get("tools")
        messages = [{key: value for key, value in message.items() if key != "tools"} for message in chat_history]
        return self.ids.prompt_text(messages, tools)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; with start and end tokens as the tokenizer adds them, if not said otherwise."""
        return self._encode([string], add_special_tokens)[0]

    def _encode(self, texts: Sequence[str], ends: bool | None = None) -> list[list[int]]:
        """Return the ids of texts. A text that begins with the start token gets no second one."""
        if ends is not None:
            return self.ids.encode_written(texts, ends)
        found: list[list[int]] = [[]] * len(texts)
        for written in (True, False):
            places = [i for i, text in enumerate(texts) if text.startswith(self._prefix) == written]
            for place, ids in zip(places, self.ids.encode_written([texts[i] for i in places], not written)):
                found[place] = ids
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood (nats) of each continuation, and whether greedy decoding would write it."""
        pairs = [_without_trailing_space(*cast("tuple[str, str]", request.args)) for request in requests]
        contexts = list(dict.fromkeys(context for context, _ in pairs if context))
        context_ids = dict(zip(contexts, self._encode(contexts), strict=True))
        whole_ids = self._encode([context + continuation for context, continuation in pairs if context])
        alone_ids = self._encode([continuation for context, continuation in pairs if not context], False)
        whole, alone = iter(whole_ids), iter(alone_ids)
        queries: list[Query] = []
        for context, _ in pairs:
            if context:
                ids = context_ids[context]
                queries.append(Query(tuple(ids), tuple(next(whole)[len(ids) :])))
            else:
                ids = next(alone)
                queries.append(Query((self.prefix_token_id,), tuple(ids[ids[:1] == [self.prefix_token_id] :])))
        return self._likelihoods(queries)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._likelihoods([Query(tuple(context), tuple(continuation)) for _, context, continuation in requests])

    def _likelihoods(self, queries: Sequence[Query]) -> list[tuple[float, bool]]:
        if any(not query.continuation for query in queries):
            raise UserError(
                "a continuation of the task has no token of its own: it is empty, or one token with its context"
            )
        with self.autocast():
            found = log_likelihoods(self.model, queries, self.progress)
        return [(each.log_prob, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood (nats) of each text, read in windows of the model's length."""
        queries: list[Query] = []
        owners: list[int] = []
        for number, ids in enumerate(self._encode([request.args[0] for request in requests])):
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                queries.append(Query(tuple(context), tuple(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._likelihoods(queries), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the longest answer."""
        engine = Engine(self.model, max(1, min(SLOTS, len(requests))))
        prompts = self._encode([request.args[0] for request in requests])
        answers = [
            _Answer(self, prompt, request.arguments[-1], number)
            for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        # Long prompts first, so that the answers under way are of similar lengths.
        order = sorted(answers, key=lambda answer: -len(answer.prompt))
        under_way = {engine.add(answer.prompt, answer.sampling): answer for answer in order}
        done = 0
        with self.autocast():
            while engine.busy:
                for event in engine.step():
                    answer = under_way[event.request]
                    if event.end != "stop":
                        answer.ids.append(event.token)
                    if event.end is None and answer.has_stopped():
                        engine.cancel(event.request)
                        event = event._replace(end="stop")
                    if event.end:
                        done += 1
                        self.progress(done, len(answers))
        return [answer.text() for answer in answers]


class _Answer:
    """A request for text: its settings as lm-eval gives them, and the ids so far."""

    def __init__(self, lm: RaggedLM, prompt: list[int], settings: dict[str, Any], number: int) -> None:
        self._tokenizer = lm.ids
        kwargs = cast("dict[str, Any]", normalize_gen_kwargs(settings, ANSWER_TOKENS))
        most = int(kwargs["max_gen_toks"])
        if most >= lm.max_length:
            raise UserError(
                f"the task asks for answers of {most:,} tokens, but the model has only {lm.max_length:,} positions: "
                "set max_gen_toks in the task's generation_kwargs"
            )
        self.prompt = prompt[-(lm.max_length - most) :]
        self.ids: list[int] = []
        self._until = handle_stop_sequences(kwargs["until"], lm.ids.decode([lm.eot_token_id]))
        self._until = [stop for stop in self._until if stop]
        # lm-eval looks for a stop string in the last tokens: as many as the string has, and two more.
        self._look_back = 2 + max(len(ids) for ids in lm.ids.encode_written(self._until, ends=False))
        penalty = kwargs.get("repetition_penalty", lm.generation.repetition_penalty)
        self.sampling = Sampling(
            temperature=float(kwargs.get("temperature", 0.0)) if kwargs["do_sample"] else 0.0,
            top_p=float(kwargs.get("top_p") or 1.0), top_k=int(kwargs.get("top_k") or 0),
            repetition_penalty=1.0 if penalty is None else float(penalty),
            max_new_tokens=most, stop_ids=tuple(lm.ids.stop_ids), seed=(0, number),
        )  # fmt: skip

    def has_stopped(self) -> bool:
        """Whether a stop string is in the last tokens."""
        recent = self._tokenizer.decode(self.ids[-self._look_back :])
        return any(stop in recent for stop in self._until)

    def text(self) -> str:
        """The text up to the first stop string."""
        text = self._tokenizer.decode(self.ids, skip_special=True)
        return postprocess_generated_text(generation=text, stop=self._until, think_end_token=None)


def _without_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    """Move the spaces at a context's end to its continuation, where words have them."""
    bare = context.rstrip()
    return (bare, context[len(bare) :] + continuation) if context else (context, continuation)
