"""Write the items of the local tasks in tests/tasks/local: `python -m tests.tasks.make_local`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.jobs import NOUNS, VERBS, sentence, write_jsonl

FOLDER = Path(__file__).parent / "local"


def choice(r: random.Random, letters: bool) -> dict[str, Any]:
    words = r.sample(NOUNS, 4)
    choices = [word if letters else f"{word} {r.choice(VERBS)} {r.choice(NOUNS)}" for word in words]
    return {"question": f"Who {r.choice(VERBS)} the {r.choice(NOUNS)}? {sentence(r)}", "choices": choices,
            "gold": r.randrange(4)}  # fmt: skip


def main() -> None:
    r = random.Random(0)
    write_jsonl(FOLDER / "data" / "choice.jsonl", [choice(r, False) for _ in range(24)])
    write_jsonl(FOLDER / "data" / "shots.jsonl", [choice(r, False) for _ in range(6)])
    write_jsonl(FOLDER / "data" / "letters.jsonl", [choice(r, True) for _ in range(24)])
    texts = [{"question": sentence(r), "answer": r.choice(NOUNS)} for _ in range(12)]
    write_jsonl(FOLDER / "data" / "words.jsonl", texts)
    write_jsonl(FOLDER / "data" / "texts.jsonl", [{"text": " ".join(sentence(r) for _ in range(4))} for _ in range(8)])


if __name__ == "__main__":
    main()
