"""The engine against transformers, against a full forward pass, and against itself with other requests beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.checkpoint import save_model
from minimind_ray.model.engine import Engine, Event, generate, stream
from minimind_ray.model.sampling import Sampling
from minimind_ray.model.transformer import Transformer

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 80, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"qk_norm": False, "qkv_bias": True},
    {"num_experts": 4, "moe_intermediate_size": 32},
]
PROMPTS = [[5, 9, 1], [17], [3, 3, 60, 2, 8, 41, 7, 90, 11], [12, 13]]


def make(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelShape(**BASE, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def run(engine: Engine, answers: dict[int, list[Event]] | None = None) -> dict[int, list[Event]]:
    """All that is asked of the engine, by request."""
    answers = {} if answers is None else answers
    while engine.busy:
        for event in engine.step():
            answers.setdefault(event.request, []).append(event)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("fields", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(fields: dict[str, Any], penalty: float, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make(**fields)
    save_model(model, None, tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected: list[list[int]] = [
        theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    greedy = Sampling(temperature=0, max_new_tokens=24, repetition_penalty=penalty)
    assert generate(model, PROMPTS, greedy) == expected
    assert list(stream(Engine(model, 1), PROMPTS[2], greedy)) == expected[2]

    eos = expected[2][5]
    until_eos = [ids[: ids.index(eos)] if eos in ids else ids for ids in expected]
    stopping = Sampling(temperature=0, max_new_tokens=24, repetition_penalty=penalty, stop_ids=(eos,))
    assert generate(model, PROMPTS, stopping) == until_eos


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = make()
    texts = [generate(model, PROMPTS, Sampling(max_new_tokens=16, seed=(seed,))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(ids) for ids in generate(model, [[5]] * 4, Sampling(max_new_tokens=16))}) == 4


@pytest.mark.parametrize("fields", FAMILIES)
@pytest.mark.parametrize("reuse", [False, True])
def test_an_answer_is_the_same_alone_and_among_others(fields: dict[str, Any], reuse: bool) -> None:
    model = make(**fields)
    asked = [
        (prompt, Sampling(temperature, top_p, 0, penalty, length, seed=(7, i)))
        for i, (prompt, (temperature, top_p, penalty, length)) in enumerate(
            zip(
                [*PROMPTS, [5, 9, 1, 4], [5, 9], [17]],
                [
                    (0, 1, 1, 9), (1, 1, 1, 5), (1, 0.9, 1.2, 12), (0, 1, 1.3, 1), (0.7, 1, 1, 7), (1, 1, 1, 11),
                    (0, 1, 1, 3),
                ],
            )
        )
    ]  # fmt: skip
    alone = [generate_one(model, prompt, sampling) for prompt, sampling in asked]

    engine, answers = Engine(model, 3, reuse=reuse), dict[int, list[Event]]()
    ids = [engine.add(*each) for each in asked[:4]]  # The fourth waits until a slot is free.
    for _ in range(4):
        for event in engine.step():
            answers.setdefault(event.request, []).append(event)
    ids += [engine.add(*each) for each in asked[4:]]
    run(engine, answers)
    assert [[event.token for event in answers[id]] for id in ids] == alone
    assert all([event.end for event in answers[id]][-2:] == [None, "length"][-len(answers[id]) :] for id in ids)


def generate_one(model: Transformer, prompt: list[int], sampling: Sampling) -> list[int]:
    return list(stream(Engine(model, 1), prompt, sampling))


def test_log_probs_are_the_models_own_at_temperature_1() -> None:
    model = make()
    engine = Engine(model, 2)
    asked = [(PROMPTS[2], Sampling(0.5, 0.8, 7, 1.3, 9, seed=(3,), log_probs=True)), (PROMPTS[0], Sampling())]
    for prompt, sampling in asked:
        engine.add(prompt, sampling)
    events, without = run(engine).values()
    assert len(events) == 9 and all(event.log_prob is None for event in without)

    tokens = torch.tensor([*PROMPTS[2], *(event.token for event in events)])
    with torch.no_grad():
        logits = model.project(model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)))
    start = len(PROMPTS[2])
    expected = logits.log_softmax(-1)[start - 1 : -1].gather(1, tokens[start:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([event.log_prob for event in events]), expected, rtol=1e-4, atol=1e-4)


def test_the_stop_id_is_an_event_and_ends_its_answer_alone() -> None:
    model = make()
    greedy = Sampling(temperature=0, max_new_tokens=10)
    (first,), (second,) = ([generate_one(model, prompt, greedy)] for prompt in PROMPTS[1:3])
    stop = next(token for i, token in enumerate(first[:-1]) if i and token not in first[:i])
    engine = Engine(model, 2)
    one = engine.add(PROMPTS[1], Sampling(temperature=0, max_new_tokens=10, stop_ids=(stop,)))
    other = engine.add(PROMPTS[2], greedy)
    answers = run(engine)
    assert [event.token for event in answers[one]] == first[: first.index(stop) + 1]
    assert answers[one][-1].end == "stop"
    assert [event.token for event in answers[other]] == second


def test_what_is_cancelled_makes_room_for_what_waits() -> None:
    model, greedy = make(), Sampling(temperature=0, max_new_tokens=6)
    expected = [generate_one(model, prompt, greedy) for prompt in PROMPTS]
    engine = Engine(model, 2)
    first, second, third, fourth = (engine.add(prompt, greedy) for prompt in PROMPTS)
    answers: dict[int, list[Event]] = {}
    for event in engine.step():
        answers[event.request] = [event]
    engine.cancel(first)
    engine.cancel(third)
    run(engine, answers)
    assert {id: len(events) for id, events in answers.items()} == {first: 1, second: 6, fourth: 6}
    for id in (second, fourth):
        assert [event.token for event in answers[id]] == expected[id]
    engine.cancel(second)  # It has ended: nothing happens.
    assert not engine.busy and engine.step() == []


def counted(model: Transformer) -> list[int]:
    """How many tokens go through the model in each pass from now on."""
    read: list[int] = []
    decode = model.decode
    model.decode = lambda tokens_N, *rest: read.append(len(tokens_N)) or decode(tokens_N, *rest)  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("fields", FAMILIES)
def test_a_conversation_goes_on_as_if_all_of_it_were_read_anew(fields: dict[str, Any]) -> None:
    model = make(**fields)
    read, engine = counted(model), Engine(model, 1, reuse=True)
    sampling = Sampling(0.9, 1.0, 0, 1.2, 6, seed=(3,))

    def answer(prompt: list[int], new: int) -> list[int]:
        """Both ways; `new` tokens of the prompt go through the model."""
        expected = generate_one(model, prompt, sampling)
        read.clear()
        found = list(stream(engine, prompt, sampling))
        assert found == expected
        assert read[0] == new
        return found

    first = [5, 9, 1, 22]
    said = answer(first, 4)
    # The last token that was drawn has not been read yet.
    second = [*first, *said, 7, 8]
    again = answer(second, 3)
    answer([*second, *again[:3], 60], 1)
    answer([*second[:6], 2, 2, 2], 3)  # Turned back to an earlier point.
    answer(second[:6], 1)  # Only the last token is read again.
    answer([1, 2], 2)  # Nothing in common.


def test_conversations_keep_their_slots_and_share_a_beginning() -> None:
    model = make()
    read, engine, greedy = counted(model), Engine(model, 2, reuse=True), Sampling(temperature=0, max_new_tokens=3)

    def ask(prompt: list[int], new: int) -> list[int]:
        read.clear()
        found = list(stream(engine, prompt, greedy))
        assert read[0] == new
        return [*prompt, *found]

    system = [30, 31, 32, 33, 34]
    one = ask([*system, 1, 2], 7)
    other = ask([*system, 3, 4], 2)  # The beginning is copied, and the first conversation stays.
    for _ in range(2):
        one, other = ask([*one, 5], 2), ask([*other, 6], 2)
    ask([50, 51], 2)  # Takes the slot of the one that was not used for longest.
    ask([*other, 7], 2)


def test_a_broken_off_answer_leaves_the_cache_true() -> None:
    model, greedy = make(), Sampling(temperature=0, max_new_tokens=8)
    engine = Engine(model, 1, reuse=True)
    answer = stream(engine, PROMPTS[2], greedy)
    begun = [next(answer) for _ in range(3)]
    answer.close()
    prompt = [*PROMPTS[2], *begun, 4]
    assert list(stream(engine, prompt, greedy)) == generate_one(model, prompt, greedy)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([5, 97], "token id 97, but the model's ids are 0 to 96"),
        ([-1], "token id -1"),
        ([5] * 513, "513 tokens, but the model only 512 positions"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_others_are_answered(prompt: list[int], message: str) -> None:
    model, greedy = make(), Sampling(temperature=0, max_new_tokens=3)
    engine = Engine(model, 2)
    good = engine.add(PROMPTS[0], greedy)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, greedy)
    answer = [event.token for event in run(engine)[good]]
    assert answer == generate_one(model, PROMPTS[0], greedy)


def test_an_engine_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="slots is 0: an engine needs at least 1"):
        Engine(make(), 0)
    assert generate(make(), [], Sampling()) == []
