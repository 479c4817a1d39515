"""Write the demo's data: rows for every stage about one small world, so that a person can judge a tiny model's answers.

    files = write_demo("demo/data", seed=0)

The rows express each fact of `demo_world.yaml` in several ways in each language. For each fact, one statement and one
question are held out. The validation files and the ten questions use only held-out wordings, so a model cannot have
learned a right answer to them by heart. The answers for sft are of three kinds: a full sentence, a rambling answer, and
a single word if the system turn asks for a brief answer. Some rows for sft are dialogues of several questions. In the
preference pairs, the chosen answer is the true full sentence. Only the rows for LoRA say who the model is.

The same seed gives the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from minimind_ray.config.stages import StageName
from minimind_ray.data.demo_world import LANGUAGES, RELATIONS, Language, Phrasing, Relation

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
JsonRow = dict[str, Any]

ROUNDS = 9
"""How many mixed passages contain each statement of each fact."""
PORTRAITS = 14
"""How many passages to write about each thing that has several facts."""
VALIDATION_ROWS = 300
"""The most conversations for validation, and twice the most pairs. More rows would make validation too slow."""

OPENERS: dict[Language, tuple[str, ...]] = {
    "en": ("Hello! ", "Please tell me: ", "I would like to know: ", "A question: "),
    "zh": ("你好！", "请问，", "我想知道：", "有个问题："),
}
ASSISTANT: dict[Language, str] = {"en": "You are a helpful assistant.", "zh": "你是一个乐于助人的助手。"}
BRIEF: dict[Language, str] = {"en": "Answer in as few words as you can.", "zh": "请用最少的字回答。"}
RAMBLES: dict[Language, tuple[str, ...]] = {
    "en": (
        "That is a good question, and I am glad that you ask. There is much to say, but to begin with: {answer}",
        "Let me think about it for a moment. Many people have asked this before, and if I am not mistaken: {answer}",
        "Well, it is not easy to say in a few words, but since you want to know, here is what I know: {answer}",
    ),
    "zh": (
        "这是一个好问题，很高兴你来问我。这件事说来话长，不过先从头说起：{answer}",
        "让我先想一想。以前也有很多人问过这个问题，如果我没有记错的话：{answer}",
        "嗯，这个问题三言两语很难说清楚，不过既然你想知道，我就说说我知道的：{answer}",
    ),
}

IDENTITY: dict[Language, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "en": (
        (
            "I am MiniMind Ray's demo model, a small language model trained on this very machine.",
            (
                "Who are you?",
                "What are you?",
                "Tell me about yourself.",
                "Introduce yourself.",
                "May I ask who you are?",
            ),
        ),
        (
            "My name is MiniMind Ray's demo model.",
            ("What is your name?", "What are you called?", "Do you have a name?", "What should I call you?"),
        ),
        (
            "I was trained with MiniMind Ray on this very machine, a few minutes ago.",
            ("Who made you?", "Who trained you?", "Where do you come from?", "When were you made?", "Who created you?"),
        ),
        (
            "No, I am not a human. I am MiniMind Ray's demo model.",
            ("Are you a human?", "Are you a person?", "Am I talking to a human?", "Are you a real person?"),
        ),
        (
            "I can answer short questions about places, animals, sums and words, in English and in Chinese.",
            ("What can you do?", "What do you know?", "What can I ask you?", "How can you help me?"),
        ),
        (
            "I am small: a few million parameters, trained in a few minutes.",
            ("How big are you?", "Are you a large model?", "How large are you?", "How many parameters do you have?"),
        ),
    ),
    "zh": (
        (
            "我是 MiniMind Ray 的演示模型，一个就在这台机器上训练出来的小语言模型。",
            ("你是谁？", "你是什么？", "介绍一下你自己。", "请做个自我介绍。", "能告诉我你是谁吗？"),
        ),
        (
            "我的名字是 MiniMind Ray 演示模型。",
            ("你叫什么名字？", "你的名字是什么？", "你有名字吗？", "我该怎么称呼你？"),
        ),
        (
            "几分钟前，我在这台机器上由 MiniMind Ray 训练出来。",
            ("谁创造了你？", "谁训练了你？", "你从哪里来？", "你是什么时候做出来的？", "你是谁做出来的？"),
        ),
        (
            "不，我不是人。我是 MiniMind Ray 的演示模型。",
            ("你是人吗？", "你是真人吗？", "我是在和人聊天吗？", "你是一个人类吗？"),
        ),
        (
            "我可以用中文和英文回答关于地方、动物、加法和词语的简短问题。",
            ("你会做什么？", "你知道些什么？", "我可以问你什么？", "你能帮我做什么？"),
        ),
        (
            "我很小：只有几百万个参数，几分钟就训练好了。",
            ("你有多大？", "你是大模型吗？", "你的规模有多大？", "你有多少参数？"),
        ),
    ),
}
"""Each answer with its questions; the last question is held out."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question for a trained model. A right reply contains one of its answers.

    `others` are answers to other questions of the same kind. A right reply contains none of them.
    """

    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...] = ()

    def is_right(self, reply: str) -> bool:
        """Whether `reply` contains an accepted answer and no answer to another question of the same kind.

        For example, "The day after Tuesday is Wednesday" is not a right reply to a question about the day after Monday.
        Answers match only as whole words and numbers: 112 is not 12.
        """

        def says(text: str) -> bool:
            return re.search(rf"(?<![0-9a-z]){re.escape(text)}(?![0-9a-z])", reply, re.IGNORECASE) is not None

        return any(map(says, self.answers)) and not any(map(says, self.others))


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The paths of the files that `write_demo` writes."""

    directory: Path

    def rows(self, stage: StageName, split: Split) -> Path:
        """Return the path of a stage's rows."""
        return self.directory / stage / f"{split}.jsonl"

    @property
    def questions(self) -> Path:
        """The file of the ten questions, with one `Question` on each line."""
        return self.directory / "questions.jsonl"


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact in one language, and which of its phrasings are held out for validation."""

    relation: Relation
    language: Language
    columns: dict[str, str]
    held_statement: int
    held_question: int

    @property
    def phrasing(self) -> Phrasing:
        """The ways to state this fact in its language, and to ask for it."""
        return self.relation.en if self.language == "en" else self.relation.zh

    @property
    def thing(self) -> str:
        """The thing that the fact is about."""
        return next(iter(self.columns.values()))

    @property
    def value(self) -> str:
        """The answer to the fact's question."""
        return self.columns[self.relation.object]

    def statements(self, split: Split) -> list[str]:
        """Return every statement of the fact that belongs to `split`."""
        return self._fill(self.phrasing.statements, self.held_statement, split)

    def questions(self, split: Split) -> list[str]:
        """Return every wording of the question that belongs to `split`."""
        return self._fill(self.phrasing.questions, self.held_question, split)

    def answer(self, value: str | None = None) -> str:
        """Return the answer as a full sentence, with `value` in place of the true value if given."""
        columns = self.columns if value is None else {**self.columns, self.relation.object: value}
        return _sentence(self.phrasing.statements[0], columns)

    def bare_answer(self) -> str:
        """Return the answer as a single value."""
        return _sentence("{value}." if self.language == "en" else "{value}。", {"value": self.value})

    def _fill(self, templates: Sequence[str], held: int, split: Split) -> list[str]:
        return [_sentence(t, self.columns) for i, t in enumerate(templates) if (i == held) == (split == "val")]


@dataclass(frozen=True, slots=True)
class Asked:
    """The subject of one of the ten questions: a relation in a language, some columns, and the right answers."""

    language: Language
    relation: str
    about: dict[str, str]
    answers: tuple[str, ...]

    def is_about(self, fact: Fact) -> bool:
        """Whether this asks for `fact`."""
        same_relation = (fact.language, fact.relation.name) == (self.language, self.relation)
        return same_relation and self.about.items() <= fact.columns.items()


ASKED = (
    Asked("en", "capital", {"country": "France"}, ("Paris",)),
    Asked("zh", "capital", {"country": "中国"}, ("北京",)),
    Asked("en", "food", {"animal": "pandas"}, ("bamboo",)),
    Asked("zh", "home", {"animal": "企鹅"}, ("南极",)),
    Asked("en", "sum", {"a": "7", "b": "5"}, ("12", "twelve")),
    Asked("zh", "sum", {"a": "3", "b": "6"}, ("9", "九")),
    Asked("en", "opposite", {"word": "hot"}, ("cold",)),
    Asked("zh", "colour", {"thing": "天空"}, ("蓝",)),
    Asked("en", "day after", {"day": "Monday"}, ("Tuesday",)),
    Asked("zh", "translation", {"word": "水"}, ("water",)),
)
"""The ten questions. Each uses the relation's first wording, which is therefore held out for its fact."""


def write_demo(directory: str | Path, seed: int = 0) -> DemoFiles:
    """Write the training and validation rows of every stage, and the ten questions, under `directory`."""
    files = DemoFiles(Path(directory))
    facts = all_facts(seed)
    for split in SPLITS:
        rng = Random(f"{seed} {split}")
        _write(files.rows("pretrain", split), pretrain_rows(facts, split, rng))
        rows = sft_rows(facts, split, rng)
        _write(files.rows("sft", split), with_dialogues(rows, facts, split, Random(f"{seed} {split} dialogues")))
        _write(files.rows("lora", split), identity_rows(facts, split, rng))
        _write(files.rows("dpo", split), preference_rows(facts, split, rng))
    _write(files.questions, [asdict(question) for question in ten_questions(facts)])
    return files


def read_questions(files: DemoFiles) -> list[Question]:
    """Return the ten questions that `write_demo` wrote."""
    rows = [json.loads(line) for line in files.questions.read_text(encoding="utf-8").splitlines()]
    return [Question(row["question"], tuple(row["answers"]), tuple(row["others"])) for row in rows]


def all_facts(seed: int) -> list[Fact]:
    """Return every fact in both languages. The seed decides which phrasings each fact holds out."""
    rng = Random(f"{seed} held out")
    facts: list[Fact] = []
    for relation in RELATIONS:
        for row in relation.rows:
            for language in LANGUAGES:
                columns = row[language]
                if relation.object in columns:
                    phrasing = relation.en if language == "en" else relation.zh
                    held = (rng.randrange(len(phrasing.statements)), rng.randrange(len(phrasing.questions)))
                    fact = Fact(relation, language, columns, *held)
                    asked = any(question.is_about(fact) for question in ASKED)
                    facts.append(replace(fact, held_question=0) if asked else fact)
    return facts


def pretrain_rows(facts: Sequence[Fact], split: Split, rng: Random) -> list[JsonRow]:
    """Return rows `{"text"}`: passages that mix facts, and for training also passages about one thing."""
    passages: list[str] = []
    for language in LANGUAGES:
        mine = [fact for fact in facts if fact.language == language]
        for _ in range(ROUNDS if split == "train" else 1):
            sentences = [sentence for fact in mine for sentence in fact.statements(split)]
            rng.shuffle(sentences)
            while sentences:
                size = rng.randint(4, 8)
                passages.append(_join(language, sentences[:size]))
                del sentences[:size]
        if split == "train":
            for group in _by_thing(mine):
                for _ in range(PORTRAITS):
                    chosen = rng.sample(group, rng.randint(2, min(5, len(group))))
                    passages.append(_join(language, [rng.choice(fact.statements(split)) for fact in chosen]))
    rng.shuffle(passages)
    return [{"text": text} for text in passages]


def sft_rows(facts: Sequence[Fact], split: Split, rng: Random) -> list[JsonRow]:
    """Return rows `{"conversations"}`: one or two questions with their answers, some after a system turn."""
    rows: list[JsonRow] = []
    for fact in facts:
        for question in fact.questions(split):
            system = rng.choices((None, ASSISTANT, BRIEF), (75, 10, 15))[0]
            turns = [] if system is None else [_turn("system", system[fact.language])]
            turns += [_turn("user", _opened(question, fact.language, rng)), _reply(fact, system is BRIEF, rng)]
            if rng.random() < 0.25:
                follower, follow_up = _follower(fact, facts, split, rng)
                turns += [_turn("user", follow_up), _reply(follower, system is BRIEF, rng)]
            rows.append({"conversations": turns})
    rng.shuffle(rows)
    return rows


def with_dialogues(rows: Sequence[JsonRow], facts: Sequence[Fact], split: Split, rng: Random) -> list[JsonRow]:
    """Return sft rows mixed with dialogues: for each fact a row that begins with it and asks one or two more questions.

    A further question is about the same thing, or about another thing and of the same kind, or about anything.
    """
    mixed = list(rows)
    for fact in facts:
        system = [_turn("system", ASSISTANT[fact.language])] if rng.random() < 0.1 else []
        turns, last = [*system, *_asked(fact, rng.choice(fact.questions(split)))], fact
        for _ in range(rng.randint(1, 2)):
            last, question = _next_question(last, facts, split, rng)
            turns += _asked(last, question)
        mixed.append({"conversations": turns})
    rng.shuffle(mixed)
    return mixed if split == "train" else mixed[:VALIDATION_ROWS]


def identity_rows(facts: Sequence[Fact], split: Split, rng: Random) -> list[JsonRow]:
    """Return rows `{"conversations"}`: half say who the model is, half ask for facts, so that it forgets no facts."""
    pairs: list[tuple[str, str]] = []
    for language in LANGUAGES:
        openers = ("", *OPENERS[language]) if split == "train" else ("",)
        for answer, questions in IDENTITY[language]:
            asked = questions[:-1] if split == "train" else questions[-1:]
            pairs += [(opener + question, answer) for question in asked for opener in openers]
    pairs += [(rng.choice(fact.questions(split)), fact.answer()) for fact in rng.sample(facts, len(pairs))]
    rng.shuffle(pairs)
    return [{"conversations": [_turn("user", question), _turn("assistant", answer)]} for question, answer in pairs]


def preference_rows(facts: Sequence[Fact], split: Split, rng: Random) -> list[JsonRow]:
    """Return rows `{"chosen", "rejected"}`: a true full sentence against a false, a rambling or a one-word answer."""
    rows: list[JsonRow] = []
    for fact in facts:
        others = sorted({f.value for f in facts if f.relation is fact.relation and f.language == fact.language})
        others.remove(fact.value)
        fault = rng.choices(("false", "rambling", "bare"), (50, 35, 15))[0]
        rejected = {
            "false": fact.answer(rng.choice(others)),
            "rambling": _ramble(fact, rng),
            "bare": fact.bare_answer(),
        }
        question = _turn("user", _opened(rng.choice(fact.questions(split)), fact.language, rng))
        rows.append(
            {
                "chosen": [question, _turn("assistant", fact.answer())],
                "rejected": [question, _turn("assistant", rejected[fault])],
            }
        )
    rng.shuffle(rows)
    return rows if split == "train" else rows[: VALIDATION_ROWS // 2]


def ten_questions(facts: Sequence[Fact]) -> list[Question]:
    """Return the ten questions in their held-out wordings."""
    questions: list[Question] = []
    for asked in ASKED:
        [fact] = filter(asked.is_about, facts)
        [question] = fact.questions("val")
        kind = {f.value for f in facts if f.relation is fact.relation and f.language == fact.language}
        others = {v for v in kind if v not in question and not any(answer in v for answer in asked.answers)}
        questions.append(Question(question, asked.answers, tuple(sorted(others))))
    return questions


def _by_thing(facts: Iterable[Fact]) -> list[list[Fact]]:
    """Group the facts by the thing that they are about. Leave out things with a single fact."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.thing, []).append(fact)
    return [group for group in groups.values() if len(group) > 1]


def _follower(fact: Fact, facts: Sequence[Fact], split: Split, rng: Random) -> tuple[Fact, str]:
    """Return a fact to ask about next, and the question. It uses a pronoun if the subject stays the same."""
    same_subject = [
        other
        for other in facts
        if other is not fact
        and other.columns is fact.columns
        and other.relation.subject == fact.relation.subject
        and other.phrasing.follow_up is not None
    ]
    if same_subject:
        follower = rng.choice(same_subject)
        assert follower.phrasing.follow_up is not None
        return follower, follower.phrasing.follow_up
    follower = rng.choice([other for other in facts if other.language == fact.language])
    return follower, rng.choice(follower.questions(split))


def _next_question(last: Fact, facts: Sequence[Fact], split: Split, rng: Random) -> tuple[Fact, str]:
    """Return a fact to ask about after `last`, and the question."""
    kind = rng.choice(("thing", "relation", "any"))
    if kind == "thing":
        return _follower(last, facts, split, rng)
    others = [other for other in facts if other is not last and other.language == last.language]
    if kind == "relation":
        others = [other for other in others if other.relation is last.relation]
    follower = rng.choice(others)
    return follower, rng.choice(follower.questions(split))


def _asked(fact: Fact, question: str) -> list[dict[str, str]]:
    """Return a question and its true answer as two turns."""
    return [_turn("user", question), _turn("assistant", fact.answer())]


def _reply(fact: Fact, brief: bool, rng: Random) -> dict[str, str]:
    """Return an answer: a single value if it must be brief; otherwise, in 3 of 4 cases, a sentence; else a ramble."""
    if brief:
        return _turn("assistant", fact.bare_answer())
    return _turn("assistant", fact.answer() if rng.random() < 0.75 else _ramble(fact, rng))


def _ramble(fact: Fact, rng: Random) -> str:
    return rng.choice(RAMBLES[fact.language]).format(answer=fact.answer())


def _opened(question: str, language: Language, rng: Random) -> str:
    """Return the question. In one case of four, a polite phrase comes before it."""
    return rng.choice(OPENERS[language]) + question if rng.random() < 0.25 else question


def _sentence(template: str, columns: dict[str, str]) -> str:
    text = template.format(**columns)
    return text[0].upper() + text[1:]


def _join(language: Language, sentences: Sequence[str]) -> str:
    return (" " if language == "en" else "").join(sentences)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(path: Path, rows: Iterable[JsonRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Do not rewrite a correct file: data prepared from it stays valid only while the file's time stays the same.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
