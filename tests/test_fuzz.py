"""Files that others made, damaged in every way one can think of: reading them works or ends in a sentence.

Each example changes one file of a good directory, as bytes or as JSON, and reads it as the commands do. Anything but
success or UserError fails, as do more than some seconds and a gigabyte. A few examples each run with the suite, always
the same; for many that differ:

    MINIMIND_FUZZ=2000 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_ray.cli.runs import _facts
from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, parse_override, read_yaml, to_yaml
from minimind_ray.config.schema import LoraConfig, ModelConfig
from minimind_ray.config.search import read_sweep_file
from minimind_ray.data.encode import RowEncoder
from minimind_ray.data.records import discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.diagnose.facts import read_facts
from minimind_ray.diagnose.rules import diagnose
from minimind_ray.diagnose.sweep import diagnose_sweep
from minimind_ray.diagnose.words import to_json as findings_json
from minimind_ray.display.findings import sweep_json
from minimind_ray.model.checkpoint import load_model, model_fingerprint, save_model
from minimind_ray.model.lora import adapters, add_lora, load_adapter, save_adapter
from minimind_ray.model.minimind_pth import export_pth, import_pth
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.recipe import read_recipe, stage_config
from minimind_ray.stages.use import open_trained
from minimind_ray.stages.verify import check_checkpoint
from minimind_ray.sweep.axes import parse_assignment, parse_axis, plan_trials
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.export import to_json, to_records
from minimind_ray.sweep.report import render
from minimind_ray.sweep.resume import reopen_sweep
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.train.checkpoint import load_resume, optimizer_tensors, save_resume
from minimind_ray.train.optim import build_adamw
from minimind_ray.train.progress import Progress
from minimind_ray.train.run import RunDirectory, resolve_model
from tests.jobs import make_tokenizer, rows_of
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("MINIMIND_FUZZ", "0"))
SECONDS, BYTES = 10, 1 << 30


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Hypothesis's settings: `examples`, always the same, or as many new ones as MINIMIND_FUZZ says."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def guarded() -> Iterator[None]:
    """Fail on anything but UserError, on more than SECONDS, and on BYTES more of memory."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"more than {SECONDS} seconds")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, limits[1]))
    try:
        yield
    except UserError as error:
        assert str(error).strip()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Damage

NUMBERS = [0, 1, -1, 2, 3, 7, 63, 64, 2**31, 2**53, 2**63 - 1, 2**64, 10**9, 10**18, 10**400, 0.5, 1e-300, 1e308, -0.0]
TEXTS = [
    "", " ", "\0", "..", "../../x", "/etc/passwd", "\ud800", "\udc80x", "a" * 100_000, "[red]", "[/x]", "{{ 1/0 }}",
    "{% for i in range(10**9) %}x{% endfor %}", "$\\frac$", "1e999", "\n\x1b[2J", "<|im_end|>", "step-00000001", "F32",
    "val/loss", "0-99999999999", "log(1,2)", "int(1,1e300)", "\u202e", "é" * 50,
]  # fmt: skip
ALIASES = b"a: &a [x]\n" + b"".join(b"b: &%c [%s]\n" % (i + 1, b", ".join([b"*%c" % i] * 9)) for i in b"abcdefghijkl")
SPECIAL = [
    b"", b"\0", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"a": ' + b"1" * 5000 + b"}", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b"\x1f\x8b", b"PAR1",
    b"PK\3\4", b"!!python/object:os.system x",
    ALIASES, b"a: &a [*a]", b"a: &a {<<: *a}", b"stage: 2001-99-99", b"- " * 5000, b"? [a]\n: b",
    b"a: 0b_", b"a: 1:99999999999999999999:1", b"a: !!binary x", b"%YAML 9.9\n---\n", b"<<: 3", b"a: !!timestamp x",
]  # fmt: skip
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"9" * 30, b"\\", b"\n", b"null", b"NaN", b"\0", b"e9"]
plain = (
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.floats() | st.integers()
    | st.text(st.characters(codec=None), max_size=8)
)  # fmt: skip
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4), max_leaves=6
)


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


@st.composite
def changed_value(draw: st.DrawFn, document: Any) -> Any:
    """JSON with one to three of its values replaced, left out, or put under another key."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(min(len(node), 50))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            match draw(st.integers(0, 5)):
                case 0:
                    del node[key]
                case 1 if isinstance(node, dict):
                    node[draw(st.sampled_from(TEXTS))] = node.pop(key)
                case 2:
                    node[key] = nested(draw(st.sampled_from([3, 60, 70, 400])))
                case _:
                    node[key] = draw(values)
            break
    return document


def to_text(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some overwritten, cut out, doubled, or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        stop = start + draw(st.sampled_from([0, 1, 4, 8, 100, 10**9]))
        with_ = draw(
            st.binary(max_size=9)
            | st.sampled_from(PIECES)
            | st.sampled_from([*SPECIAL, content[start : start + 50] * 2])
        )
        content = content[:start] + with_ + content[stop:]
    return content


def damaged(file: Path) -> st.SearchStrategy[bytes]:
    """Content that the file could have instead of its own."""
    content = file.read_bytes()
    ways = st.one_of(changed_bytes(content), st.sampled_from(SPECIAL))
    if file.suffix == ".json":
        return mostly(changed_value(json.loads(content)).map(to_text), ways)
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        return mostly(changed_value(rows).map(lambda rows: b"\n".join(map(to_text, rows)) + b"\n"), ways)
    if file.suffix == ".yaml":
        return mostly(changed_value(read_yaml(file)).map(to_text), ways)
    if file.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

        def join(header: Any) -> bytes:
            text = to_text(header)
            return struct.pack("<Q", len(text)) + text + rest

        return mostly(changed_value(header).map(join), ways)
    return ways


def mostly(usual: st.SearchStrategy[bytes], other: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.integers(0, 3).flatmap(lambda die: usual if die else other)


# What is read, and how


LEDGER = {"packs_per_step": 2, "packs_per_epoch": 5, "epochs": {"0": "0-1 3*2"}}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint to go on from, an adapter, a .pth file, a sweep, configs and rows."""
    root = tmp_path_factory.mktemp("good")
    tokenizer = Tokenizer.load(make_tokenizer(root / "tokenizer"))
    tiny = ModelConfig(
        preset="tiny", hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = Transformer(tiny.shape(tokenizer.vocab_size))
    run = RunDirectory(root / "run")
    config = load_config("pretrain", overrides={"out": str(run.path)})
    run.create(config, {"result": "checkpoints/step-00000001", "steps": 1}, resume=False)
    run.append("metrics.jsonl", {"step": 1, "tokens": 9, "loss": 2.5, "timing": {"seconds": 0.5}})
    run.append("samples.jsonl", {"step": 1, "samples": ["x"]})
    optimizer = build_adamw(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def write(directory: Path) -> None:
        save_model(model, tokenizer, directory)
        save_resume(directory, optimizer_tensors(model, optimizer), vars(Progress(1, 9, "step-00000001", 2.5, LEDGER)))

    run.save_checkpoint("step-00000001", write)
    base = run.checkpoint_path("step-00000001")
    export_pth(base, root / "pth" / "model.pth")
    shutil.copytree(base, root / "granite")
    granite = tiny.model_copy(
        update={"qk_norm": False, "num_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1}
    )
    save_model(Transformer(granite.shape(tokenizer.vocab_size)), tokenizer, root / "granite")
    add_lora(model, LoraConfig(rank=2), seed=0)
    save_adapter(model, root / "adapter", base, model_fingerprint(base))
    make_sweep(root / "sweep", axes={"dpo.beta": [0.1, 0.3]}, seeds=1, examples=8, steps=10, quality=lambda p: 0.5)
    info = root / "sweep" / "sweep.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "search": {"trials": 2}}))
    for number, file in enumerate(sorted(root.glob("sweep/trials/*/trial.json"))):
        file.write_text(json.dumps({**json.loads(file.read_text()), "number": number}))
    configs = root / "configs"
    configs.mkdir()
    (configs / "stage.yaml").write_text(to_yaml(config))
    experiments = Path(__file__).parents[1] / "experiments"
    shutil.copy(experiments / "quickstart.yaml", configs / "recipe.yaml")
    shutil.copy(experiments / "sweeps" / "quickstart.yaml", configs / "sweep.yaml")
    return root


TOKENS_N, BOUNDS_D1 = torch.arange(5), torch.tensor([0, 5], dtype=torch.int32)


def use_run(root: Path) -> None:
    use_model(root / "run")


def use_granite(root: Path) -> None:
    use_model(root / "granite")


def use_model(directory: Path) -> None:
    trained = open_trained(directory)
    trained.model(TOKENS_N, BOUNDS_D1)
    use_tokenizer(trained.tokenizer)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.decode(tokenizer.encode(["Some text.", "<|im_start|>"])[0])
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size and tokenizer.fingerprint
    tokenizer.prompt_ids([{"role": "system", "content": "a"}, {"role": "user", "content": "<|im_end|> \ufdd0"}])


def use_checkpoint(root: Path) -> None:
    list(check_checkpoint(root / "run"))


def resume(root: Path) -> None:
    directory = root / "run" / "checkpoints" / "step-00000001"
    model = load_model(directory)
    optimizer = build_adamw(model, load_config("pretrain").optim)
    Progress.of(load_resume(directory, model, optimizer), directory)


def go_on_with_run(root: Path) -> None:
    run = RunDirectory(root / "run")
    json.dumps(_facts(run.path))
    resolve_model(run.path)
    run.check(load_config("pretrain"), resume=True)


def diagnose_run(root: Path) -> None:
    json.dumps(findings_json(diagnose(read_facts(str(root / "run"))), "zh"), allow_nan=False)


def forget(root: Path) -> None:
    RunDirectory(root / "run").forget_after(1)


def use_adapter(root: Path) -> None:
    open_trained(root / "adapter", base=root / "run")
    model = load_model(root / "run" / "checkpoints" / "step-00000001")
    load_adapter(model, root / "adapter", model_fingerprint(root / "run" / "checkpoints" / "step-00000001"))
    assert adapters(model)


def read_pth(root: Path) -> None:
    import_pth(root / "pth" / "model.pth", root / "tokenizer", root / "imported")


def use_sweep(root: Path) -> None:
    sweep = read_sweep(root / "sweep")
    comparison = compare([sweep])
    json.dumps(to_json(comparison))
    to_records(comparison)
    render(sweep, comparison)
    json.dumps(sweep_json(diagnose_sweep(sweep), "en"), allow_nan=False)


def go_on_with_sweep(root: Path) -> None:
    reopen_sweep(root / "sweep")


def use_config(root: Path) -> None:
    to_yaml(load_config("pretrain", [root / "configs" / "stage.yaml"])).encode()


def use_recipe(root: Path) -> None:
    recipe = read_recipe(root / "configs" / "recipe.yaml")
    for index in range(len(recipe.stages)):
        stage_config(recipe, index, "runs", "tokenizer", Path("data"), {})


def use_sweep_file(root: Path) -> None:
    sweep = read_sweep_file(root / "configs" / "sweep.yaml")
    base = load_config(sweep.stage, trees={"sweep": sweep.settings})
    axes = [parse_axis(key, spec) for key, spec in sweep.axes.items()]
    if (sweep.trials or 1) * sweep.seeds < 1000:
        plan_trials(base, axes, draws=sweep.trials, seeds=sweep.seeds)


CHECKPOINT, TRIAL = "run/checkpoints/step-00000001", "sweep/trials/beta=0.1,seed=0"
TARGETS: list[tuple[str, Callable[[Path], None]]] = [
    *[(f"{CHECKPOINT}/{name}", use_run)
      for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")],
    *[(f"granite/{name}", use_granite) for name in ("config.json", "model.safetensors")],
    *[(f"{CHECKPOINT}/{name}", use_checkpoint)
      for name in ("resume/sums.json", "resume/state.json", "resume/optimizer.safetensors", "model.safetensors")],
    *[(f"{CHECKPOINT}/resume/{name}", resume) for name in ("state.json", "optimizer.safetensors")],
    *[(f"run/{name}", go_on_with_run) for name in ("run.json", "config.yaml", "metrics.jsonl")],
    *[(f"run/{name}", diagnose_run) for name in ("run.json", "config.yaml", "metrics.jsonl", "samples.jsonl")],
    *[(f"run/{name}", forget) for name in ("metrics.jsonl", "samples.jsonl")],
    *[(f"adapter/{name}", use_adapter) for name in ("adapter_config.json", "adapter_model.safetensors")],
    ("pth/model.pth", read_pth),
    *[(name, use_sweep) for name in (
        "sweep/sweep.json", f"{TRIAL}/run.json", f"{TRIAL}/trial.json", f"{TRIAL}/metrics.jsonl",
        f"{TRIAL}/samples.jsonl", f"{TRIAL}/validation.parquet",
    )],
    *[(name, go_on_with_sweep) for name in ("sweep/sweep.json", f"{TRIAL}/trial.json", f"{TRIAL}/config.yaml")],
    ("configs/stage.yaml", use_config),
    ("configs/recipe.yaml", use_recipe),
    ("configs/sweep.yaml", use_sweep_file),
]  # fmt: skip


@pytest.mark.parametrize(("name", "use"), TARGETS, ids=[f"{use.__name__}-{name}" for name, use in TARGETS])
def test_a_damaged_file_is_one_sentence(name: str, use: Callable[[Path], None], good: Path) -> None:
    file = good / name
    content = file.read_bytes()
    use(good)  # What is not damaged works.
    shutil.rmtree(good / "imported", ignore_errors=True)

    @fuzz(12)
    @given(damaged(file))
    def damage(other: bytes) -> None:
        file.write_bytes(other)
        with guarded():
            use(good)

    try:
        damage()
    finally:
        file.write_bytes(content)


# Rows


def encode(path: Path, tokenizer: Tokenizer) -> None:
    data = load_config("pretrain", overrides={"data.max_seq_len": 64, "data.pack_tokens": 256}).data
    for source in discover(str(path)):
        for stage in ("pretrain", "sft", "dpo"):
            list(RowEncoder(stage, tokenizer, data).encode(read_rows(source)))


ROWS = [
    {"text": "Some text."},
    {"conversations": [
        {"role": "system", "content": "a", "tools": '[{"name": "f"}]'}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d", "reasoning_content": "e"},
    ]},
    *rows_of("dpo", 1),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_rows_of_any_kind(suffix: str, good: Path, tmp_path: Path) -> None:
    tokenizer, file = Tokenizer.load(good / "tokenizer"), tmp_path / f"rows{suffix}"
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    whole = b"\n".join(map(to_text, ROWS)) + b"\n"
    text = changed_value(ROWS).map(lambda rows: b"\n".join(map(to_text, rows)))
    content = text.map(pack) | changed_bytes(whole).map(pack) | changed_bytes(pack(whole))

    @fuzz(40)
    @given(content | st.sampled_from(SPECIAL))
    def read(content: bytes) -> None:
        file.write_bytes(content)
        with guarded():
            encode(file, tokenizer)

    read()


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".csv", ".tsv", ".txt"])
def test_files_of_other_formats(suffix: str, good: Path, tmp_path: Path) -> None:
    tokenizer, file = Tokenizer.load(good / "tokenizer"), tmp_path / f"rows{suffix}"
    whole = {
        ".json": json.dumps(ROWS, indent=1).encode(), ".csv": b'text,prompt\n"Some, text",a\n"Two\nlines",\n',
        ".tsv": b"text\tprompt\nSome text\ta\n", ".txt": b"Some text.\n\nMore of it.\n",
    }[suffix.removesuffix(".gz")]  # fmt: skip
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    content = changed_bytes(whole).map(pack) | changed_bytes(pack(whole)) | st.sampled_from(SPECIAL)
    if suffix.startswith(".json"):
        content |= changed_value(ROWS).map(to_text).map(pack)

    @fuzz(25)
    @given(content)
    def read(content: bytes) -> None:
        file.write_bytes(content)
        with guarded():
            encode(file, tokenizer)

    read()


types = st.recursive(
    st.sampled_from([
        pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float64(), pa.bool_(), pa.date32(),
        pa.timestamp("ns"), pa.duration("s"), pa.null(), pa.decimal128(30, 3), pa.dictionary(pa.int8(), pa.string()),
    ]),
    lambda inner: inner.map(pa.list_)
    | st.dictionaries(st.sampled_from(["role", "content"]), inner, min_size=1)
    .map(lambda fields: pa.struct(list(fields.items()))),
    max_leaves=4,
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    columns: dict[str, pa.Array] = {}
    names = draw(st.lists(st.sampled_from(["text", "conversations", "chosen", "rejected", "tools", ""]), unique=True))
    for name in names:
        kind = draw(types)
        try:
            columns[name] = pa.array([draw(values), None], kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            columns[name] = pa.nulls(2, kind)
    stream = io.BytesIO()
    pq.write_table(pa.table(columns or {"x": pa.nulls(1)}), stream)
    return stream.getvalue()


def test_parquet_of_any_kind(good: Path, tmp_path: Path) -> None:
    tokenizer, file = Tokenizer.load(good / "tokenizer"), tmp_path / "rows.parquet"
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)

    @fuzz(60)
    @given(tables() | changed_bytes(stream.getvalue()))
    def read(content: bytes) -> None:
        file.write_bytes(content)
        with guarded():
            encode(file, tokenizer)

    read()


# The command line


KEYS = ["optim.lr", "data.train", "model.rope_scaling", "lora.targets", "x.y", "", "stage", "scale.workers"]
ARGUMENTS = [*TEXTS, *(content.decode("utf-8", "surrogateescape") for content in SPECIAL)]


@fuzz(100)
@given(
    st.sampled_from(KEYS) | st.text(max_size=8),
    st.text(max_size=30) | st.sampled_from(ARGUMENTS) | values.map(json.dumps),
)
def test_settings_and_axes_of_any_text(key: str, value: str) -> None:
    with guarded():
        to_yaml(load_config("pretrain", overrides=dict([parse_override(f"{key}={value}")]))).encode()
    with guarded():
        axis = parse_assignment(f"{key}={value}")
        plan_trials(load_config("pretrain"), [axis], draws=3)
    with guarded():
        plan_trials(load_config("pretrain"), [parse_assignment(f"{key}={value}")])
