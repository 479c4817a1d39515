"""Write the model card: the README.md of the checkpoint that a run ends with, in the form of the Hugging Face Hub.

The card says what the model is, how each stage made it, how it was validated, and how to load it. It is made from files
of the run and of the runs that it started from, as far as they exist. It holds no time and no place, so a second
writing gives the same card. `card.md.j2` has its text.

A card is for publication. Only names of files are shown, not their folders, and `redact` removes secrets and places
from every value that enters the template.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, read_yaml
from minimind_ray.config.reading import dump_yaml, read_json
from minimind_ray.config.schema import ModelShape
from minimind_ray.config.stages import STAGES
from minimind_ray.data.files import one_line
from minimind_ray.data.hub import HubRef, fetch_tokenizer, hub_ref, pin
from minimind_ray.data.redact import redact
from minimind_ray.data.storage import CARD, StoreError, is_url
from minimind_ray.data.store import Manifest, read_manifest
from minimind_ray.model.checkpoint import load_shape
from minimind_ray.model.families import family_of
from minimind_ray.model.lora import CONFIG as ADAPTER_CONFIG
from minimind_ray.train.best import best_validation
from minimind_ray.train.intervals import clustered_mean, clustered_share
from minimind_ray.train.run import VALIDATION, RunDirectory, inside

if TYPE_CHECKING:
    from jinja2 import Template

PLACEHOLDER = "USER/NAME"
"""Stands for the repository's name, which is known only when the model is pushed."""
BASE, BASE_NAME = "BASE", "the base's name or directory"
"""Stand for the base of an adapter in a command and in code, if the base is not on the hub."""
TEMPLATE = Path(__file__).with_name("card.md.j2")
LONGEST_LINEAGE = 16
LEAST_CLUSTERS = 5
MOST_SAMPLES, LONGEST_SAMPLE, MOST_FILES = 3, 600, 8
HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@[^/]*)?/.*")
HIDDEN = (
    "out",
    "init_from",
    "data.train",
    "data.val",
    "data.tokenizer",
    "data.cache_dir",
    "data.fields",
    "data.ignore",
)
"""Settings that a card does not show: places, and the user's own words."""
HIDDEN_SECTIONS = ("track", "eval", "scale", "checkpoint")


@dataclass(frozen=True)
class Data:
    """The rows of one split. `key` is the beginning of the prepared set's hash; without a manifest, `rows` is None."""

    split: str
    files: list[str]
    key: str
    rows: int | None = None
    documents: int | None = None
    tokens: int | None = None

    @property
    def text(self) -> str:
        """One line: names, counts, hash."""
        counts = ((self.rows, "rows"), (self.documents, "documents"), (self.tokens, "tokens"))
        known = [f"{count:,} {noun}" for count, noun in counts if count is not None]
        return ", ".join([*map(_code, self.files), *known, f"prepared as {_code(self.key)}"])


@dataclass(frozen=True)
class StageFacts:
    """What a card says about one stage of a model's lineage."""

    name: str
    start: str
    steps: int | None
    planned: int | None
    tokens: int | None
    state: str
    settings: dict[str, Any]
    data: list[Data]
    validation: dict[str, float]
    versions: dict[str, str]

    @property
    def length(self) -> str:
        """How long the stage was trained, as a line; empty if it is unknown."""
        if self.steps is None:
            return ""
        planned = f" of {self.planned:,} ({self.state})" if self.planned not in (None, self.steps) else ""
        return f"{self.steps:,} steps{planned}" + (f", {self.tokens:,} tokens" if self.tokens is not None else "")


@dataclass(frozen=True)
class Place:
    """A run and the name of one of its checkpoints, or (`checkpoint` empty) a directory with a model."""

    run: RunDirectory
    checkpoint: str

    def directory(self) -> Path:
        """Return the local path of the checkpoint, in which the JSON files that describe the model are present."""
        for name in ("config.json", ADAPTER_CONFIG):
            self.run.file(f"{self.checkpoint}/{name}" if self.checkpoint else name)
        return self.run.path / self.checkpoint


@dataclass
class Lineage:
    """The stages that made a model, first to last; the model of the hub that they began with; data sets of the hub."""

    stages: list[StageFacts] = field(default_factory=list[StageFacts])
    hub_base: str | None = None
    datasets: list[str] = field(default_factory=list[str])

    @property
    def direct_base(self) -> str | None:
        """The model of the hub that the last stage started from."""
        return self.hub_base if len(self.stages) == 1 else None


def finish(
    run: RunDirectory, *, state: str, steps: int, tokens: int, result: str | None, base: Path | None = None
) -> None:
    """Write the card into the checkpoint `result`, then the end of the run into run.json.

    `base` is the local directory of the model that the run started from, if it is known.
    """
    run.send()  # If the store fails, this error says how to resume.
    facts: dict[str, Any] = {"state": state, "steps": steps, "tokens": tokens, "result": result}
    if result:
        place = Place(run, result)
        if place.directory().is_dir() and (text := _card_or_warning(place, {**run.info(), **facts}, base)):
            run.write(f"{result}/{CARD}", text)
    run.update(**facts)


def _card_or_warning(place: Place, info: Mapping[str, Any], base: Path | None) -> str | None:
    """Return the card; None after a warning if it cannot be made, such as from a damaged file of an earlier run."""
    try:
        return card(place, info, base)
    except Exception as error:  # The model is trained: its card must not make the run fail.
        print(f"{place.run.where}: the model card could not be made: {one_line(error)}", file=sys.stderr)
        return None


def card(place: Place, info: Mapping[str, Any] | None = None, base: Path | None = None) -> str:
    """Return the card of a checkpoint or a model directory.

    `info` stands for the content of run.json, if that is not written yet. `base` is as in `finish`.
    """
    directory = place.directory()
    own = {**place.run.info(), **(info or {})}
    lineage = _lineage(place, own)
    adapter = _adapter(directory)
    shape = _shape(directory, place, base)
    last = STAGES.get(lineage.stages[-1].name) if lineage.stages else None
    header = f"---\n{dump_yaml(_header(lineage, adapter, shape))}"
    return header + _template().render(
        adapter=adapter,
        shape=shape,
        family=family_of(shape).model_type if shape else None,
        parameters=sum(math.prod(size) for _, size in family_of(shape).tensors(shape)) if shape else None,
        lineage=lineage,
        validation=_validation(place),
        samples=_samples(place),
        continues_texts=last is not None and last.rows == "text",
        repository=PLACEHOLDER,
        unnamed=(BASE, BASE_NAME),
    )


@cache
def _template() -> Template:
    """Return the card's template. It passes every value through `redact`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
        finalize=lambda value: redact(str(value)),
    )  # fmt: skip
    environment.filters |= {"count": "{:,}".format, "setting": _setting, "fenced": _fenced, "result": _result}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def locate(where: str) -> Place:
    """Return the place of a model by its path or URL: a run, a checkpoint of a run, or a model directory."""
    run = RunDirectory(where.rstrip("/"))
    parts = run.where.rsplit("/", 2)
    if len(parts) == 3 and parts[1] == "checkpoints":
        owner = RunDirectory(parts[0])
        if owner.file("config.yaml").exists():
            return Place(owner, f"checkpoints/{parts[2]}")
    if run.file("config.yaml").exists():
        result = run.info().get("result")
        if isinstance(result, str) and inside(result):
            return Place(run, result)
        if checkpoints := run.checkpoints():
            return Place(run, str(checkpoints[-1].relative_to(run.path)))
    return Place(run, "")


def _lineage(place: Place, info: Mapping[str, Any]) -> Lineage:
    """Return the stages up to `place`. It ends, without an error, at the first model about which nothing is known."""
    found = Lineage()
    with suppress(UserError, StoreError, OSError):
        while place.checkpoint and len(found.stages) < LONGEST_LINEAGE:
            config = read_yaml(place.run.file("config.yaml"))
            if config.get("stage") not in STAGES:
                break
            base = config.get("init_from")
            hub = hub_ref(base) if isinstance(base, str) and is_url(base) else None
            earlier = locate(base) if isinstance(base, str) and not hub else None
            found.datasets = list(dict.fromkeys([*_hub_datasets(config), *found.datasets]))
            found.stages.insert(0, _stage(place, config, info, _start(info, hub, earlier)))
            if hub:
                found.hub_base = hub.name
            if earlier is None:
                break
            place, info = earlier, earlier.run.info()
    return found


def _start(info: Mapping[str, Any], hub: HubRef | None, earlier: Place | None) -> str:
    """Return, as a phrase, what a stage started from."""
    inputs = info.get("inputs")
    print_ = inputs.get("init_from") if isinstance(inputs, dict) else None
    weights = f" (weights {print_:.12})" if isinstance(print_, str) else ""
    if hub:
        return f"the model `{hub.name}` of the hub{f' at commit {hub.revision}' if hub.revision else ''}{weights}"
    if earlier is None:
        return "new weights"
    return f"the model of the stage before{weights}" if earlier.checkpoint else f"a model of unknown origin{weights}"


def _stage(place: Place, config: Mapping[str, Any], info: Mapping[str, Any], start: str) -> StageFacts:
    lines = list(_metrics(place.run))
    line = _line_of(place, lines) or best_validation(lines) or {}
    versions = info.get("versions")
    return StageFacts(
        name=str(config["stage"]),
        start=start,
        steps=_whole(info.get("steps")),
        planned=_whole(info.get("planned_steps")),
        tokens=_whole(info.get("tokens")),
        state=str(info.get("state")),
        settings=_changed(config),
        data=list(_data(config, info)),
        validation={k.removeprefix("val/"): v for k, v in line.items() if k.startswith("val/") and _finite(v)},
        versions={k: str(v) for k, v in versions.items() if k in ("minimind-ray", "torch")}
        if isinstance(versions, dict)
        else {},
    )


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the stage's defaults, by dotted key."""
    default = _flat(load_config(str(config["stage"])).model_dump(mode="json"))
    return {
        key: value
        for key, value in _flat(config).items()
        if key in default and value != default[key] and key not in HIDDEN and key.split(".")[0] not in HIDDEN_SECTIONS
    }


def _flat(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{at}{key}" not in HIDDEN and value:
            flat |= _flat(value, f"{at}{key}.")
        else:
            flat[f"{at}{key}"] = value
    return flat


def _sources(config: Mapping[str, Any], split: str) -> list[str]:
    data = config.get("data")
    where = data.get(split) if isinstance(data, dict) else None
    return [where] if isinstance(where, str) else [str(each) for each in where or ()]


def _hub_datasets(config: Mapping[str, Any]) -> list[str]:
    """Return the hub's data sets that a run was trained on."""
    return [found[1] for where in _sources(config, "train") if (found := HUB_DATA.fullmatch(where))]


def _data(config: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[Data]:
    """Yield what is known of the training data, then of the validation data."""
    inputs = info.get("inputs")
    for split in ("train", "val"):
        prepared = inputs.get(f"data.{split}") if isinstance(inputs, dict) else None
        if not isinstance(prepared, str):
            continue
        key, manifest = prepared.rpartition("/")[2][:12], None
        with suppress(UserError, StoreError, OSError):
            manifest = read_manifest(prepared)
        yield _described(manifest, split, key) or Data(split, _names(_sources(config, split)), key)


def _described(manifest: Manifest | None, split: str, key: str) -> Data | None:
    if manifest is None:
        return None
    total = manifest.total
    return Data(split, _names(list(manifest.sources)), key, total("kept"), total("documents"), total("tokens"))


def _names(places: list[str]) -> list[str]:
    """Return names of files without their folders; a data set of the hub keeps its name."""
    names: list[str] = []
    for place in places:
        name = place.rstrip("/").rpartition("/")[2]
        names.append(f"{found[1]}: {name}" if (found := HUB_DATA.fullmatch(place)) else name)
    more = len(names) - MOST_FILES
    return [*names[:MOST_FILES], f"{more:,} more"] if more > 0 else names


def _metrics(run: RunDirectory) -> Iterator[dict[str, Any]]:
    with suppress(UserError, StoreError, OSError):
        yield from run.metrics()


def _line_of(place: Place, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the line of metrics.jsonl of the checkpoint's step, if that step was validated."""
    step = place.checkpoint.rpartition("step-")[2]
    return next((line for line in lines if f"{line['step']:08d}" == step and "val/loss" in line), None)


def _validation(place: Place) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Return the results of the checkpoint's validation: name, value, and its 95 % interval if there is one."""
    if not (line := _line_of(place, list(_metrics(place.run)))):
        return []
    intervals: dict[str, tuple[float, float]] = {}
    with suppress(UserError, StoreError, OSError):
        intervals = _intervals(place.run.file(VALIDATION), line["val/loss"])
    shown = ("loss", "perplexity", "bits_per_byte", "accuracy", "margin")
    return [(n, line[f"val/{n}"], intervals.get(n)) for n in shown if _finite(line.get(f"val/{n}"))]


def _intervals(path: Path, loss: float) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals from the per-example results, if these belong to a validation with this mean loss."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
        columns = {n: table[n].to_numpy() for n in table.column_names}
        total, count, cluster = columns["loss"], columns["count"], columns["cluster"]
        whole = math.isclose(float(total.sum() / count.sum()), loss)
    except (pa.ArrowException, KeyError):
        return {}
    if not whole or len(set(cluster.tolist())) < LEAST_CLUSTERS:
        return {}
    found = {"loss": clustered_mean(total, count, cluster)}
    if "accuracy" in columns:
        found["accuracy"] = clustered_share(columns["accuracy"], cluster)
    else:
        low, high = found["loss"]
        found["perplexity"] = math.exp(min(low, 700.0)), math.exp(min(high, 700.0))
    return found


def _samples(place: Place) -> list[str]:
    """Return texts that the model wrote at the checkpoint's step, or at the last step before.

    Answers to prompts that were drawn from the validation data are left out: a public card must not quote the data.
    """
    step, found = place.checkpoint.rpartition("step-")[2], list[str]()
    with suppress(UserError, StoreError, OSError):
        given = (read_yaml(place.run.file("config.yaml")).get("eval") or {}).get("prompts") or []
        for line in place.run.samples():
            public = all(prompt in given for prompt in line.get("prompts") or ())
            if public and line["step"] and f"{line['step']:08d}" <= step and isinstance(line.get("samples"), list):
                found = [str(text) for text in line["samples"]]
    return [t if len(t) <= LONGEST_SAMPLE else f"{t[:LONGEST_SAMPLE]} …" for t in found[:MOST_SAMPLES] if t.strip()]


def _adapter(directory: Path) -> dict[str, Any] | None:
    """Return an adapter's rank and projections; None for a whole model."""
    if (directory / "config.json").exists() or not (directory / ADAPTER_CONFIG).exists():
        return None
    content = read_json(directory / ADAPTER_CONFIG)
    targets = content.get("target_modules")
    leaves = {str(name).rpartition(".")[2] for name in targets} if isinstance(targets, list) else {str(targets)}
    return {
        "rank": content.get("r"), "alpha": content.get("lora_alpha"), "dora": bool(content.get("use_dora")),
        "targets": sorted(leaves),
    }  # fmt: skip


def _shape(directory: Path, place: Place, base: Path | None) -> ModelShape | None:
    """Return the model's shape; for an adapter, the shape of its base if its files are here."""
    with suppress(UserError, StoreError, OSError):
        if (directory / "config.json").exists():
            return load_shape(directory)
        if base is None:
            named = read_yaml(place.run.file("config.yaml")).get("init_from") if place.checkpoint else None
            named = str(named or read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path"))
            ref = hub_ref(named)
            base = fetch_tokenizer(pin(ref)) if ref else locate(named).directory()  # With config.json.
        return load_shape(base)
    return None


def _header(lineage: Lineage, adapter: Mapping[str, Any] | None, shape: ModelShape | None) -> dict[str, Any]:
    """Return the hub's metadata, which stands as YAML at the beginning of the card."""
    names = [stage.name for stage in lineage.stages]
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    tags = ["minimind", "minimind-ray", *names[-1:]]
    if shape:
        tags.append(family_of(shape).model_type)
    if lineage.hub_base:
        direct = adapter is not None and lineage.direct_base is not None
        header |= {"base_model": lineage.hub_base, "base_model_relation": "adapter" if direct else "finetune"}
        if direct:
            tags.append(f"base_model:adapter:{lineage.hub_base}")
    if adapter:
        tags.append("lora")
    if lineage.datasets:
        header["datasets"] = lineage.datasets
    return {**header, "tags": list(dict.fromkeys(tags))}


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _code(text: Any) -> str:
    """Return a text of one line as Markdown code."""
    line = " ".join(_plain(redact(str(text))).split()).replace("`", "'").replace("|", "/")
    return f"`{line}`"


def _result(value: float, name: str = "") -> str:
    """Return a result of a validation as text."""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"


def _setting(value: Any) -> str:
    """Return a setting's value as in YAML, on one line."""
    shown = ", ".join(map(str, value)) if isinstance(value, list) else dump_yaml(value).removesuffix("...\n")
    return " ".join(_plain(shown).split())


def _fenced(text: str) -> str:
    """Return a text as a Markdown code block. The fence is longer than any fence inside the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_plain(text).rstrip()}\n{fence}"
