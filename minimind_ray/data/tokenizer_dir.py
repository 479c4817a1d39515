"""Read the files of a tokenizer directory as transformers' AutoTokenizer does (tried with version 5.24).

transformers does not always use tokenizer.json unchanged. For some values of `tokenizer_class` it builds a new
normalizer, pre-tokenizer and decoder. tokenizer_config.json may also change and add tokens. `read_tokenizer` applies
these changes, so that `tokenizer.py` needs only the resulting tokenizer.json. It refuses classes that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import tokenizers
from tokenizers import AddedToken

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import parse_json, read_json, read_text, require_own

NO_TOKENIZER = "; this is not a tokenizer directory: give one with tokenizer.json and tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"  # the folder of all chat templates but the default

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
AS_IS = "PreTrainedTokenizerFast"  # the class for which transformers uses tokenizer.json unchanged

Json = dict[str, Any]


class Rebuilt(NamedTuple):
    """The changes that transformers makes for a tokenizer class.

    `parts` makes new parts of tokenizer.json from its content; `names` are the default special tokens.
    """

    parts: Callable[[Json], Json]
    names: dict[str, str]


def read_tokenizer(folder: Path) -> tuple[str, Json]:
    """Return the text of tokenizer.json, and the content of tokenizer_config.json with the chat templates added.

    Both already contain the changes that transformers would make.

    Raises:
        UserError: a file is missing or broken, or uses a feature that is not supported here.
    """
    definition = read_own(folder / "tokenizer.json")
    settings = {**read_json(folder / "tokenizer_config.json", NO_TOKENIZER)}
    templates = _template_files(folder)
    if templates:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    if settings.get("split_special_tokens"):
        raise UserError(f"{folder}: split_special_tokens in tokenizer_config.json is not supported; remove it")
    if "added_tokens_decoder" not in settings and (folder / "special_tokens_map.json").exists():
        settings |= read_json(folder / "special_tokens_map.json", NO_TOKENIZER)
    layout = parse_json(definition, f"{folder}: tokenizer.json")
    try:
        return _resolve(definition, layout, settings, _class_of(folder, layout, settings), str(folder))
    except UserError:
        raise
    except Exception as error:  # The tokenizers library raises bare exceptions.
        raise UserError(f"{folder}: tokenizer.json is broken ({error}); give another tokenizer directory") from error


def read_own(file: Path) -> str:
    """Return the text of a file of the directory.

    Raises:
        UserError: the file is missing, is a link to another place, or is not text.
    """
    require_own(file)
    return read_text(file, hint=NO_TOKENIZER)


def token_name(settings: Json, key: str, where: str) -> str | None:
    """Return the content of a token setting such as `eos_token` in tokenizer_config.json; None if it is missing.

    Raises:
        UserError: the token is not a string.
    """
    token = settings.get(key)
    if isinstance(token, dict):
        token = cast(Json, token).get("content")
    if token is not None and not isinstance(token, str):
        raise UserError(f"{where}: {key} in tokenizer_config.json is not a string; make it a string")
    return token


def _template_files(folder: Path) -> dict[str, str]:
    default = folder / "chat_template.jinja"
    files = {"default": default} if default.exists() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    return {name: read_own(file) for name, file in files.items()}


def _resolve(definition: str, layout: Json, settings: Json, cls: str, where: str) -> tuple[str, Json]:
    """Apply to tokenizer.json all changes that the class and the settings make. Returns it and the settings left."""
    rebuilt = REBUILT.get(cls)
    if cls.removesuffix("Tokenizer") in UNKNOWN:
        raise UserError(
            f"{where}: tokenizer_class {cls} is not supported, because transformers changes tokenizer.json for it; "
            f"set it to {AS_IS} to use tokenizer.json unchanged"
        )
    if rebuilt and layout["model"].get("type") != "BPE":
        raise UserError(f"{where}: tokenizer_class is {cls}, but tokenizer.json is not BPE; set it to {AS_IS}")
    # Do not add these tokens: a document's begin, end and padding tokens must already be in the vocabulary.
    required = {token_name(settings, key, where) for key in ("bos_token", "eos_token", "pad_token")}
    settings = {**(rebuilt.names if rebuilt else {}), **settings}
    names = {key: token_name(settings, key, where) for key in NAMED_TOKENS if key in settings}
    new = _new_tokens(layout, settings, _named_tokens(settings, names))
    if rebuilt or new:
        full = tokenizers.Tokenizer.from_str(definition)
        if rebuilt:
            layout = json.loads(full.to_str())
            parts = rebuilt.parts(settings)
            model = {**layout["model"], **parts["model"]}
            full = tokenizers.Tokenizer.from_str(json.dumps({**layout, **parts, "model": model}))
        known = full.get_vocab()
        full.add_tokens([token for token in new if token.content in known or token.content not in required])
        definition = full.to_str(pretty=True)
    return definition, {**settings, **names, "tokenizer_class": AS_IS}


def _new_tokens(layout: Json, settings: Json, named: list[str]) -> list[AddedToken]:
    """Return the tokens of tokenizer_config.json that tokenizer.json lacks or describes differently."""
    there = {token["content"]: token for token in layout.get("added_tokens") or []}
    listed: list[Json] = [
        {**token, "id": int(id)}
        for id, token in sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    ]
    new = [
        AddedToken(**{key: value for key, value in token.items() if key != "id"})
        for token in listed
        if there.get(token["content"]) != token
    ]
    known = there.keys() | {token["content"] for token in listed}
    return new + [AddedToken(content, special=True, normalized=False) for content in named if content not in known]


def _named_tokens(settings: Json, names: Mapping[str, str | None]) -> list[str]:
    """Return the content of every special token that tokenizer_config.json names."""
    extra: Any = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more: list[Any] = list(cast(Json, extra).values() if isinstance(extra, dict) else extra)
    more += [value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)]
    contents = [*names.values(), *(token["content"] if isinstance(token, dict) else token for token in more)]
    return [content for content in dict.fromkeys(contents) if content]


# The class that transformers uses


def _class_of(folder: Path, layout: Json, settings: Json) -> str:
    """Return the name of the tokenizer class without "Fast"; `AS_IS` if it uses tokenizer.json unchanged."""
    config = read_json(folder / "config.json", NO_TOKENIZER) if (folder / "config.json").exists() else {}
    model_type = str(config.get("model_type"))
    given = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if model_type in FORCED:
        return FORCED[model_type]
    if given is None:
        return CLASS_OF_TYPE.get(model_type, AS_IS)
    cls = str(given).removesuffix("Fast")
    in_bytes = '"ByteLevel"' in json.dumps([layout.get("pre_tokenizer"), layout.get("decoder")])
    return AS_IS if model_type in USE_AS_IS or (cls == "LlamaTokenizer" and in_bytes) else cls


FORCED = {"qwen2": "Qwen2Tokenizer", "qwen3_5": "Qwen3_5Tokenizer", "qwen3_5_moe": "Qwen3_5Tokenizer"}
CLASS_OF_TYPE = {
    "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer", "gemma3_text": "GemmaTokenizer", "gpt2": "GPT2Tokenizer", "phi": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer", "cohere": "CohereTokenizer",
}  # fmt: skip
USE_AS_IS = {
    "ernie4_5", "flex_olmo", "glm", "glm4", "glm4_moe", "gpt_bigcode", "granite", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "internlm2", "internlm3", "jamba", "minicpm3", "minimax_m2", "ministral", "ministral3",
    "mistral", "mistral3", "mixtral", "nemotron", "olmo2", "olmo3", "phi3", "phimoe", "smolvlm", "stablelm",
}  # fmt: skip

# The parts that transformers builds for each class

ENDOFTEXT = "<|endoftext|>"
SPLIT_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTER+|\p{N}| ?[^\s\p{L}OTHER\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _llama(settings: Json) -> Json:
    prefix = settings.get("add_prefix_space") in (None, True)
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": [*SPACES, *strip]},
        "model": {**BPE, "fuse_unk": True, "byte_fallback": True},
    }


def _gemma(settings: Json) -> Json:
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": SPACES},
        "model": {**BPE, "fuse_unk": True, "byte_fallback": True, "unk_token": settings["unk_token"]},
    }  # fmt: skip


def _bytes(settings: Json) -> Json:
    return {"normalizer": None, "pre_tokenizer": _byte_level(settings), "decoder": BYTES, "model": BPE}


def _gpt_neox(settings: Json) -> Json:
    return {**_bytes(settings), "normalizer": {"type": "NFC"}}


def _cohere(settings: Json) -> Json:
    digits = {"type": "Digits", "individual_digits": True}
    return {**_gpt_neox(settings), "pre_tokenizer": _sequence(digits, _byte_level(settings))}


def _qwen2(settings: Json, letter: str = r"\p{L}", other: str = "") -> Json:
    pattern = SPLIT_QWEN.replace("LETTER", letter).replace("OTHER", other)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    pieces = _sequence(split, {**_byte_level(settings), "use_regex": False})
    return {**_gpt_neox(settings), "pre_tokenizer": pieces}


def _qwen3_5(settings: Json) -> Json:
    return _qwen2(settings, r"[\p{L}\p{M}]", r"\p{M}")


def _byte_level(settings: Json) -> Json:
    return {**BYTES, "add_prefix_space": bool(settings.get("add_prefix_space"))}


def _sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(parts)}


BPE: Json = {
    "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
SPACES: list[Json] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]  # fmt: skip
BYTES: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}

QWEN_NAMES = {"unk_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT}
REBUILT = {
    "LlamaTokenizer": Rebuilt(_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
    "GemmaTokenizer": Rebuilt(
        _gemma,
        {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
         "mask_token": "<mask>"},
    ),
    "GPT2Tokenizer": Rebuilt(_bytes, dict.fromkeys(("unk_token", "bos_token", "eos_token"), ENDOFTEXT)),
    "GPTNeoXTokenizer": Rebuilt(
        _gpt_neox,
        {**dict.fromkeys(("unk_token", "bos_token", "eos_token"), ENDOFTEXT), "pad_token": "<|padding|>"},
    ),
    "CohereTokenizer": Rebuilt(
        _cohere,
        {"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
         "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"},
    ),
    "Qwen2Tokenizer": Rebuilt(_qwen2, QWEN_NAMES),
    "Qwen3_5Tokenizer": Rebuilt(_qwen3_5, QWEN_NAMES),
}  # fmt: skip

# Classes, without "Tokenizer", for which transformers changes tokenizer.json in ways that are not known here.
UNKNOWN = {
    "Albert", "Bart", "Barthez", "Bartpho", "Bert", "BertJapanese", "Bertweet", "BigBird", "BioGpt", "Blenderbot",
    "BlenderbotSmall", "ByT5", "CLIP", "CTRL", "Camembert", "Canine", "Clvp", "CodeGen", "CodeLlama", "Cpm", "CpmAnt",
    "DPRQuestionEncoder", "Deberta", "DebertaV2", "Dia", "Esm", "Esmc", "FNet", "FSMT", "Flaubert", "Funnel",
    "GPTNeoXJapanese", "Herbert", "LED", "Lasr", "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Luke", "Lxmert", "MBart",
    "MBart50", "MPNet", "MarkupLM", "Mgpstr", "MobileBert", "Mvp", "MyT5", "Nllb", "Nougat", "OpenAIGPT", "PLBart",
    "Pegasus", "Perceiver", "Phobert", "ProphetNet", "Rag", "Reformer", "RemBert", "RoCBert", "RoFormer", "Roberta",
    "SeamlessM4T", "Siglip2", "Splinter", "T5", "Tapas", "Udop", "VideoPrism", "Vits", "Wav2Vec2CTC",
    "Wav2Vec2PhonemeCTC", "Whisper", "XGLM", "XLM", "XLMRoberta", "XLNet",
}  # fmt: skip
