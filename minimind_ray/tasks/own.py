"""Offline tasks that every installation has. Their items are made here, the same ones at every time and place.

    mm_arithmetic   sums, differences and products: which of four numbers is right
    mm_demo         the facts of the demo's small world: which of four answers is right
    mm_tools        questions with tools: which of four answers is the right call
    mm_format       instructions about the form of an answer, checked by rules
    mm_repetition   how much of freely continued texts repeats itself

Models of a few million parameters get results between chance and perfect in them, so that two of them can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from minimind_ray.data.demo import Fact, all_facts
from minimind_ray.data.demo_world import LANGUAGES
from minimind_ray.tasks.docs import Docs

CHOICES = 4
NGRAM = 4
"""Repetition is counted in runs of this many words or characters."""
CONTINUATION = 64
"""The length of a free continuation, in tokens."""
ANSWER = 64
"""The longest answer to an instruction, in tokens."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Own:
    """A task: what makes its items, and whether they are questions to answer in a conversation."""

    rows: Callable[[Random], list[Row]]
    make: Callable[[str, Docs], Any]
    talks: bool


def own_task(name: str) -> Any:
    """Return one of the tasks in `OWN`."""
    own = OWN[name]
    return own.make(name, Docs(own.rows(Random(name))))


# Items


def _spread(right: int, rng: Random) -> list[int]:
    """Return the right number and three near ones, in a random order."""
    near = [right + step for step in (-10, -2, -1, 1, 2, 10) if right + step >= 0]
    numbers = [right, *rng.sample(near, CHOICES - 1)]
    rng.shuffle(numbers)
    return numbers


def _arithmetic(rng: Random) -> list[Row]:
    rows: list[Row] = []
    asked: set[str] = set()
    while len(rows) < 300:
        sign, most = rng.choice([("+", 9), ("+", 20), ("+", 99), ("-", 20), ("-", 99), ("×", 9)])
        a, b = rng.randint(1, most), rng.randint(1, most)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        question = rng.choice([f"What is {a} {sign} {b}?", f"{a} {sign} {b} 等于多少？"])
        if question not in asked:
            asked.add(question)
            right = {"+": a + b, "-": a - b, "×": a * b}[sign]
            numbers = _spread(right, rng)
            choices = [f"{a} {sign} {b} = {number}" for number in numbers]
            rows.append({"question": question, "choices": choices, "gold": numbers.index(right)})
    return rows


def _demo(rng: Random) -> list[Row]:
    facts = all_facts(0)
    clusters = {(fact.relation.name, id(row)): i for i, (fact, row) in enumerate(_things(facts))}
    rows: list[Row] = []
    for fact, row in rng.sample(_things(facts), 300):
        others = sorted({f.value for f in facts if f.relation is fact.relation and f.language == fact.language})
        others.remove(fact.value)
        if len(others) < CHOICES - 1:
            continue
        choices = [fact.answer(value) for value in [fact.value, *rng.sample(others, CHOICES - 1)]]
        right = choices[0]
        rng.shuffle(choices)
        cluster = clusters[fact.relation.name, id(row)]
        rows.append(
            {"question": rng.choice(fact.questions("val")), "choices": choices, "gold": choices.index(right),
             "cluster": cluster}
        )  # fmt: skip
    return rows


def _things(facts: Sequence[Fact]) -> list[tuple[Fact, Any]]:
    """Return each fact with its row of the world. Both languages of a fact have the same row."""
    rows = {id(row[language]): row for fact in facts for row in fact.relation.rows for language in LANGUAGES}
    return [(fact, rows[id(fact.columns)]) for fact in facts]


TOOLS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "get_weather": ("Return the weather of a city.", "city",
                    ("Paris", "London", "Tokyo", "Cairo", "Madrid", "Oslo", "北京", "上海", "南京", "西安"),
                    ("What is the weather in {}?", "{}今天天气怎么样？")),
    "get_time": ("Return the time in a city.", "city",
                 ("Rome", "Berlin", "Delhi", "Lima", "Vienna", "Prague", "广州", "成都", "杭州", "武汉"),
                 ("What time is it in {}?", "{}现在几点？")),
    "calculate": ("Compute an expression.", "expression",
                  ("12 + 7", "35 * 4", "90 - 18", "64 / 8", "15 * 15", "7 + 81", "50 - 6", "9 * 12", "99 / 3",
                   "23 + 32"),
                  ("Compute {}.", "请计算 {}。")),
    "translate": ("Translate a word into English.", "word",
                  ("水", "山", "月亮", "朋友", "苹果", "火车", "春天", "鱼", "书", "马"),
                  ("How do you say {} in English?", "“{}”用英语怎么说？")),
    "search": ("Search the web.", "query",
               ("the moon", "volcanoes", "Mozart", "whales", "chess", "bridges", "深海鱼", "唐诗", "熊猫", "长城"),
               ("Search the web for {}.", "请在网上搜索：{}")),
}  # fmt: skip


def _described(name: str) -> Row:
    text, parameter, _, _ = TOOLS[name]
    properties = {parameter: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}


def _call(name: str, value: str, key: str | None = None) -> str:
    call = {"name": name, "arguments": {key or TOOLS[name][1]: value}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _tools(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for name, (_, _, values, questions) in TOOLS.items():
        for value in values:
            for question in questions:
                other = rng.choice([each for each in TOOLS if each != name])
                wrong_value = rng.choice([each for each in values if each != value])
                right = _call(name, value)
                choices = [right, _call(other, value), _call(name, wrong_value), _call(name, value, key="input")]
                rng.shuffle(choices)
                offered = [name, *rng.sample([each for each in TOOLS if each not in (name, other)], 1), other]
                rng.shuffle(offered)
                rows.append(
                    {"question": question.format(value), "choices": choices, "gold": choices.index(right),
                     "tools": [_described(each) for each in offered], "name": name, "value": value}
                )  # fmt: skip
    clusters = {value: cluster for cluster, value in enumerate(dict.fromkeys(row["value"] for row in rows))}
    rng.shuffle(rows)
    return [{**row, "cluster": clusters[row["value"]]} for row in rows]


SUBJECTS = ("the sun", "cats", "winter", "a bridge", "tea", "the moon", "rivers", "music", "dogs", "a garden")
SUBJECTS_ZH = ("太阳", "猫", "冬天", "一座桥", "茶", "月亮", "河流", "音乐", "狗", "花园")

RULES: dict[str, tuple[str, str]] = {
    "one_word": ("Answer with one word only: what do you think of {}?", "只用一个词回答：你觉得{}怎么样？"),
    "yes_no": ("Answer only yes or no: do you like {}?", "只回答“是”或“不是”：你喜欢{}吗？"),
    "numbered": ("Write three lines about {}. Begin the lines with 1., 2. and 3.",
                 "写三行关于{}的话，每行分别以 1.、2.、3. 开头。"),
    "short": ("Write one sentence about {}, of at most ten words.", "写一句关于{}的话，不超过二十个字。"),
    "json": ('Write a JSON object with the single key "topic" and the value {}.',
             "写一个 JSON 对象，只有一个键 topic，值是{}。"),
    "no_digits": ("Describe {} without using any digits.", "描述{}，不要使用任何数字。"),
    "same_language": ("Write a sentence about {} in English.", "用中文写一句关于{}的话。"),
    "question": ("Ask me one question about {}.", "问我一个关于{}的问题。"),
    "begin": ('Begin your answer with "Well," and tell me about {}.', "以“好的，”开头，说说{}。"),
    "names_it": ("Write a sentence that contains the words {}.", "写一句包含“{}”的话。"),
}  # fmt: skip


def _format(rng: Random) -> list[Row]:
    rows = [
        {"question": texts[zh].format(subject), "rule": rule, "subject": subject, "zh": bool(zh), "answer": rule}
        for rule, texts in RULES.items()
        for zh, subjects in enumerate((SUBJECTS, SUBJECTS_ZH))
        for subject in subjects
    ]
    rng.shuffle(rows)
    return rows


def follows(text: str, row: Row) -> bool:
    """Return whether an answer has the form that the row's rule asks for. An empty answer never has it."""
    text, zh = text.strip(), bool(row["zh"])
    words = _words(text)
    if not words:
        return False
    match row["rule"]:
        case "one_word":
            return len(words) <= 4 if zh else len(words) == 1
        case "yes_no":
            return text.strip("。.!！ ").lower() in (("是", "不是") if zh else ("yes", "no"))
        case "numbered":
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return len(lines) == 3 and all(line.startswith(f"{i}.") for i, line in enumerate(lines, 1))
        case "short":
            return len(words) <= (20 if zh else 10) and len(text.splitlines()) == 1
        case "json":
            return _is_topic(text)
        case "no_digits":
            return not re.search(r"\d", text)
        case "same_language":
            return bool(re.search("[一-鿿]", text)) == zh and (zh or bool(re.search("[a-z]", text)))
        case "question":
            return text.endswith(("?", "？"))
        case "begin":
            return text.startswith(("好的，", "好的,") if zh else "Well,")
        case _:
            return str(row["subject"]).lower() in text.lower()


def _is_topic(text: str) -> bool:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and list(cast("Row", value)) == ["topic"]


OPENERS = (
    "Once upon a time", "The reason is that", "In the morning", "The best way to", "People say that", "One day,",
    "There is a place where", "It is well known that", "When I was young,", "My friend told me", "The history of",
    "She opened the door and", "To cook rice,", "The city", "Every child",
    "从前，有一个", "今天天气", "我认为", "首先，", "很久以前", "人们常说", "春天来了，", "科学家发现", "这本书",
    "在一个小村庄里，", "要做好一件事，", "他看着窗外，", "学习的方法是", "中国的", "每个人都",
)  # fmt: skip


def _repetition(rng: Random) -> list[Row]:
    facts = all_facts(0)
    chosen = rng.sample(facts, 70)
    texts = [fact.statements("val")[0] for fact in chosen if fact.statements("val")]
    texts = [" ".join(text.split()[:3]) if " " in text else text[: len(text) // 2] for text in texts]
    rows = [{"question": text, "answer": ""} for text in [*OPENERS, *texts]]
    rng.shuffle(rows)
    return rows[:100]


def repeated(text: str) -> tuple[int, int]:
    """Return how many of a text's n-grams occurred before in it, and how many it has. Units: words and characters."""
    words = _words(text)
    grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def _words(text: str) -> list[str]:
    """Return the words of a text; each Chinese character counts as a word."""
    return re.findall(r"[^\W_一-鿿]+|[一-鿿]", text.lower())


# Tasks of lm-eval


def _config(name: str, docs: Docs, **settings: Any) -> dict[str, Any]:
    return {
        "task": name, "custom_dataset": lambda **_: {"test": docs}, "test_split": "test", "num_fewshot": 0,
        "doc_to_text": "{{question}}", **settings,
    }  # fmt: skip


def _mean_of(metric: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]


def _choice(name: str, docs: Docs) -> Any:
    settings = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    metrics = _mean_of("acc") + _mean_of("acc_norm")
    return ConfigurableTask(config=_config(name, docs, metric_list=metrics, **settings))


class _Calls(ConfigurableTask):
    """Questions with tools. The choices are continuations; besides, the model writes a call itself."""

    def fewshot_context(self, doc: Row, num_fewshot: int, *args: Any, **kwargs: Any) -> str:
        """Return the conversation with its tools, or a text that describes them if there is no chat template."""
        chat_template = kwargs.get("chat_template")
        question = str(doc["question"])
        if chat_template is None:
            tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in doc["tools"])
            return f"<tools>\n{tools}\n</tools>\n{question}\n"
        messages = [{"role": "user", "content": question, "tools": doc["tools"]}]
        return str(chat_template(messages, add_generation_prompt=True))

    def construct_requests(self, doc: Row, ctx: str | list[str], **kwargs: Any) -> list[Instance]:
        """Return the likelihood of each choice, then the call that the model writes."""
        kwargs = {key: value for key, value in kwargs.items() if key == "metadata"}
        requests = [
            Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, choice), idx=i, **kwargs)
            for i, choice in enumerate(doc["choices"])
        ]
        wanted = {"until": ["</tool_call>"], "max_gen_toks": ANSWER}
        return [*requests, Instance("generate_until", doc, (ctx, wanted), CHOICES, **kwargs)]

    def process_results(self, doc: Row, results: Sequence[Any]) -> dict[str, float]:
        """Return whether the right call is the most probable choice, and whether the model wrote it."""
        likelihoods = [found[0] for found in results[:-1]]
        right = likelihoods.index(max(likelihoods)) == doc["gold"]
        return {"acc": float(right), "written": float(_written(str(results[-1]), doc))}


def _written(text: str, doc: Row) -> bool:
    """Return whether a text is the right call. `</tool_call>` is cut off already."""
    _, _, call = text.partition("<tool_call>")
    try:
        value: Any = json.loads(call or text)
    except (ValueError, RecursionError):
        return False
    return bool(value == json.loads(_call(doc["name"], doc["value"]).split("\n")[1]))


def _calls(name: str, docs: Docs) -> Any:
    settings = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    return _Calls(config=_config(name, docs, metric_list=_mean_of("acc"), **settings))


def _rules(name: str, docs: Docs) -> Any:
    def judged(doc: Row, results: Sequence[str]) -> dict[str, float]:
        return {"followed": float(follows(results[0], doc))}

    settings = {"output_type": "generate_until", "doc_to_target": "answer", "process_results": judged}
    generation = {"until": [], "max_gen_toks": ANSWER}
    return ConfigurableTask(
        config=_config(name, docs, metric_list=_mean_of("followed"), generation_kwargs=generation, **settings)
    )


def _free(name: str, docs: Docs) -> Any:
    def counted(doc: Row, results: Sequence[str]) -> dict[str, tuple[int, int]]:
        return {"repeated": repeated(results[0])}

    def share(pairs: Sequence[tuple[int, int]]) -> float:
        return sum(count for count, _ in pairs) / max(1, sum(total for _, total in pairs))

    generation = {"until": [], "max_gen_toks": CONTINUATION, "do_sample": True, "temperature": 0.8}
    metrics = [{"metric": "repeated", "aggregation": share, "higher_is_better": False}]
    settings = {"output_type": "generate_until", "doc_to_target": "answer", "process_results": counted}
    return ConfigurableTask(config=_config(name, docs, metric_list=metrics, generation_kwargs=generation, **settings))


OWN: dict[str, Own] = {
    "mm_arithmetic": Own(_arithmetic, _choice, talks=True),
    "mm_demo": Own(_demo, _choice, talks=True),
    "mm_tools": Own(_tools, _calls, talks=True),
    "mm_format": Own(_format, _rules, talks=True),
    "mm_repetition": Own(_repetition, _free, talks=False),
}
"""The tasks by name."""
