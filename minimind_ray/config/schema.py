"""The settings of a run: one strict section for each component.

An unknown key or an impossible value is an error that names the key. The schema never changes a given value. Methods
compute derived values (such as a head's size, or the packs of a step), and raise an error if numbers do not divide.
`load.py` reads YAML files into this schema; `stages.py` declares the stages and their own sections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from minimind_ray.config.errors import UserError
from minimind_ray.config.flag import Flag, Movable
from minimind_ray.config.paths import check_location
from minimind_ray.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)
from minimind_ray.config.stages import STAGES, StageName, StageRecord
from minimind_ray.config.trackers import ALERTS, TRACKER_RECORDS, AlertKind

Location = Annotated[str, AfterValidator(check_location)]
"""A path or URL."""

FormatName = Literal[
    "text", "messages", "sharegpt", "alpaca", "completion", "preference", "openai_preference", "rated", "prompt"
]

FIELD_NAMES = (
    "text", "messages", "conversations", "role", "content", "system", "tools", "instruction", "input", "output",
    "history", "prompt", "completion", "answer", "chosen", "rejected", "preferred_output", "non_preferred_output",
    "label",
)  # fmt: skip
"""The fields of rows and turns that `data.fields` can give another name."""


TextFiles = Literal["lines", "whole"]


class DataConfig(Section):
    """The source files of the rows, and how the rows become packs."""

    train: Annotated[str | list[str] | None, Flag("--train", verbatim=True, note="may be repeated")] = Field(
        default=None, description="path, glob, folder or URL, or a list of them"
    )
    val: Annotated[str | list[str] | None, Flag("--val", verbatim=True, note="may be repeated")] = Field(
        default=None, description="validation files; default: rows held out from data.train"
    )
    val_fraction: Probability = Field(
        default=0.01, description="fraction of data.train's rows held out for validation if data.val is not given"
    )
    tokenizer: Annotated[Location | None, Flag("--tokenizer", verbatim=True)] = Field(
        default=None, description="directory with tokenizer.json, or a model of the hub; default: init_from's tokenizer"
    )
    format: FormatName | None = Field(
        default=None, description="format of the rows; default: recognised for each file from the fields of its rows"
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="your names for fields of rows, such as {prompt: question, completion: reply}"
    )
    text_files: TextFiles = Field(
        default="lines", description="the documents of a .txt file: each line, or the whole file"
    )
    ignore: list[str] = Field(default_factory=list, description="fields of rows to ignore, even if they have a meaning")
    max_seq_len: Annotated[PositiveInt, Flag("--max-seq-len", vary=True)] = Field(
        default=512, description="longest document, in tokens"
    )
    pack_tokens: Annotated[PositiveInt, Flag("--pack-tokens", vary=True)] = Field(
        default=4096, description="most tokens in a pack (the unit of training data); see batch.pass_tokens"
    )
    long_documents: Literal["split", "truncate"] = Field(
        default="split", description="pretraining documents over max_seq_len: split into several, or truncate"
    )
    long_conversations: Literal["drop", "cut_prompt", "refuse"] = Field(
        default="drop",
        description="conversations and pairs over max_seq_len. All: cut the end of the answer. If no part of the "
        "answer is left, drop leaves the row out and refuse rejects it. cut_prompt: first remove the oldest turns "
        "after the system turn, then the beginning of the question",
    )
    direct_steps: PositiveInt = Field(
        default=64,
        description="steps at the beginning in which workers read packs directly, while Ray Data starts",
    )
    cache: bool = Field(
        default=True, description="store prepared packs on disk; false: encode and pack during training"
    )
    cache_dir: Annotated[Location, Flag("--cache-dir", verbatim=True)] = Field(
        default=".cache/packs", description="directory or URL of the prepared packs"
    )
    max_reject_fraction: Fraction = Field(
        default=0.01, description="largest fraction of bad rows with which to train; 1: use damaged files, too"
    )

    @property
    def locations(self) -> list[str]:
        """The paths and URLs of the training and validation files."""
        return [path for each in (self.train, self.val) for path in ([each] if isinstance(each, str) else each or ())]

    @field_validator("train", "val")
    @classmethod
    def _are_locations(cls, value: str | list[str] | None) -> str | list[str] | None:
        for where in [value] if isinstance(value, str) else value or ():
            check_location(where)
        return value

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        for name in fields:
            if name not in FIELD_NAMES:
                near = get_close_matches(name, FIELD_NAMES, 1, 0.0)[0]
                raise ValueError(f"data.fields.{name}: rows have no such field; did you mean {near}?")
        twice = [name for name, own in fields.items() if list(fields.values()).count(own) > 1]
        if twice:
            raise ValueError(
                f"data.fields: {' and '.join(twice)} are both read from {fields[twice[0]]}; name one field"
            )
        return fields

    @model_validator(mode="after")
    def _packs_hold_documents(self) -> DataConfig:
        if self.max_seq_len < 2:
            raise ValueError("data.max_seq_len must be at least 2: a document needs a token to predict")
        if self.pack_tokens < self.max_seq_len:
            raise ValueError(
                f"data.pack_tokens is {self.pack_tokens}, less than data.max_seq_len {self.max_seq_len}: "
                "a pack must hold the longest document; raise one or lower the other"
            )
        return self


class RopeScaling(Section):
    """YaRN (Peng et al. 2023) as Hugging Face writes it."""

    rope_type: Literal["yarn"] = "yarn"
    factor: PositiveFloat = 16.0
    original_max_position_embeddings: PositiveInt = 2048
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat = 1.0


class ModelShape(Section):
    """A model's complete shape, with Hugging Face's names.

    Without experts, the shape is Qwen3's (with qk_norm), Qwen2's (with qkv_bias) or Llama's (with neither). With
    experts, it is Qwen3-MoE's (with qk_norm) or GraniteMoeShared's, which is also MiniMind-2's. The fields are also
    keys of section model, where all of them are optional; the descriptions are for users of this section.
    """

    vocab_size: PositiveInt = Field(description="default: the tokenizer's size")
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt = Field(description="default: hidden_size / num_attention_heads")
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt = 32768
    rope_theta: PositiveFloat = 1e6
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: PositiveFloat = Field(default=0.02, description="standard deviation of the initial weights")
    qk_norm: bool = True
    qkv_bias: bool = Field(default=False, description="biases of the projections to queries, keys and values")
    dropout: Probability = 0.0
    num_experts: Annotated[int, Field(ge=0)] = 0
    num_experts_per_tok: PositiveInt = 1
    n_shared_experts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="number of experts that process every token"
    )
    moe_intermediate_size: PositiveInt | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: NonNegativeFloat = 5e-4

    @model_validator(mode="after")
    def _divides(self) -> ModelShape:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary positions need an even number")
        if self.qkv_bias and (self.qk_norm or self.num_experts):
            raise ValueError(
                "model.qkv_bias needs model.qk_norm false and no model.num_experts: "
                "no supported Hugging Face model has these biases together with qk_norm or experts"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"model.num_experts {self.num_experts}"
            )
        if self.n_shared_experts and (self.qk_norm or not self.num_experts):
            raise ValueError(
                "model.n_shared_experts needs model.num_experts and model.qk_norm false: "
                "no supported Hugging Face model has both shared experts and Qwen3's attention"
            )
        if self.num_experts and not (self.qk_norm or self.norm_topk_prob):
            raise ValueError("model.norm_topk_prob must be true without qk_norm: GraniteMoeShared requires it")
        return self


MINIMIND_3: dict[str, Any] = {
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "qk_norm": True, "rms_norm_eps": 1e-6,
}  # fmt: skip
MINIMIND_2: dict[str, Any] = {
    "num_attention_heads": 8, "num_key_value_heads": 2, "qk_norm": False, "rms_norm_eps": 1e-5,
}  # fmt: skip

MINIMIND_2_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}

# MiniMind initializes weights with standard deviation 0.02; narrow models learn faster with 1 / sqrt(hidden_size).
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**MINIMIND_3, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 192},
    "small": {**MINIMIND_3, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 2, "intermediate_size": 512, "initializer_range": 0.07},
    "minimind-3": {**MINIMIND_3, "hidden_size": 768, "intermediate_size": 2432},
    "minimind-3-small": {**MINIMIND_3, "hidden_size": 512, "intermediate_size": 1664},
    "minimind-3-moe": {**MINIMIND_3, "hidden_size": 768, "intermediate_size": 2432, "num_experts": 4},
    "minimind-2": {**MINIMIND_2, "hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048},
    "minimind-2-small": {**MINIMIND_2, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "minimind-2-moe": {**MINIMIND_2, **MINIMIND_2_MOE, "hidden_size": 640, "num_hidden_layers": 8,
                       "intermediate_size": 1728, "num_experts": 4, "n_shared_experts": 1},
}  # fmt: skip


PresetName = Literal[
    "tiny", "small", "minimind-3", "minimind-3-small", "minimind-3-moe",
    "minimind-2", "minimind-2-small", "minimind-2-moe",
]  # fmt: skip


class PresetConfig(Section):
    """The part of section model that is not a field of `ModelShape`."""

    preset: Annotated[PresetName, Flag("--preset", vary=True)] = Field(
        default="minimind-3-small",
        description="shape of the model; with init_from, a preset other than the default must match the base",
    )

    @property
    def given(self) -> dict[str, Any]:
        """The fields of the shape that are set."""
        return {key: value for key, value in self.model_dump(exclude={"preset"}).items() if value is not None}

    def shape(self, vocab_size: int) -> ModelShape:
        """Return the complete shape: the preset, the given values, and derived values.

        `vocab_size` is the tokenizer's size, used if `self.vocab_size` is None.

        Raises:
            UserError: the numbers do not divide, or the vocabulary is smaller than the tokenizer's.
        """
        fields: dict[str, Any] = {**PRESETS[self.preset], **self.given}
        fields.setdefault("vocab_size", vocab_size)
        if fields["vocab_size"] < vocab_size:
            raise UserError(
                f"model.vocab_size is {fields['vocab_size']}, but the tokenizer has {vocab_size} tokens; "
                "leave model.vocab_size out to take the tokenizer's"
            )
        if "head_dim" not in fields:
            hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
            if hidden % heads:
                raise UserError(
                    f"model.hidden_size {hidden} does not divide by model.num_attention_heads {heads}; "
                    "change one, or set model.head_dim"
                )
            fields["head_dim"] = hidden // heads
        if fields.get("num_experts"):
            fields.setdefault("moe_intermediate_size", fields["intermediate_size"])
        try:
            return ModelShape.model_validate(fields)
        except ValidationError as error:
            raise UserError(
                "; ".join(
                    str(each["ctx"]["error"])
                    if each["type"] == "value_error" and "ctx" in each
                    else f"model.{each['loc'][0]}: {each['msg']}"
                    for each in error.errors()
                )
            ) from None


def _optional(field: FieldInfo) -> tuple[Any, Any]:
    """Return the type and the value of a field of `ModelShape` that may be left out."""
    kind: Any = field.annotation
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    return kind | None, Field(default=None, description=field.description)


if TYPE_CHECKING:

    class ModelConfig(PresetConfig):
        """The model to create."""

        def __init__(self, **settings: Any) -> None: ...

else:
    ModelConfig = create_model(
        "ModelConfig",
        __base__=PresetConfig,
        __module__=__name__,
        __doc__="The model to create: a preset, and values that override it. With init_from, the base determines the "
        "model.",
        **{name: _optional(field) for name, field in ModelShape.model_fields.items()},
    )


class BatchConfig(Section):
    """The amount of data in one optimizer step."""

    tokens: Annotated[PositiveInt, Flag("--batch-tokens", vary=True)] = Field(
        default=32768, description="token budget of one optimizer step, over all workers"
    )
    pass_tokens: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="most tokens in one forward pass: a worker joins the packs of a step up to this number. auto: one "
        "pack on a CPU; on a GPU about as many tokens as fit, at most 131072. Experts are balanced over a pass",
    )


class OptimConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: Annotated[PositiveFloat, Flag("--lr", vary=True), Movable()] = Field(
        default=5e-4, description="peak learning rate"
    )
    weight_decay: Annotated[NonNegativeFloat, Movable()] = 0.01
    beta1: Annotated[Probability, Movable()] = 0.9
    beta2: Annotated[Probability, Movable()] = 0.95
    eps: PositiveFloat = 1e-8
    clip: Annotated[NonNegativeFloat, Movable()] = Field(
        default=1.0, description="largest global gradient norm; 0: do not clip gradients"
    )


class ScheduleConfig(Section):
    """The learning rate over the run."""

    name: Annotated[Literal["cosine", "constant", "linear", "wsd"], Flag("--schedule", vary=True)] = "cosine"
    warmup: Annotated[int, Field(ge=0), Flag("--warmup", vary=True)] = Field(
        default=0, description="steps of linear warm-up"
    )
    final: Fraction = Field(default=0.1, description="last learning rate, as a fraction of the peak")
    decay: Fraction = Field(default=0.2, description="wsd: fraction of the run, at its end, in which the rate decays")


class TrainConfig(Section):
    """Length of the run, seed, precision."""

    epochs: Annotated[PositiveInt, Flag("--epochs", vary=True)] = 1
    max_steps: Annotated[PositiveInt | None, Flag("--max-steps", vary=True)] = Field(
        default=None,
        description="number of optimizer steps, over as many epochs as needed; replaces train.epochs",
    )
    seed: Annotated[int, Field(ge=0), Flag("--seed")] = 0
    precision: Annotated[Literal["auto", "bfloat16", "float32"], Flag("--precision", vary=True)] = Field(
        default="auto", description="auto: bfloat16 matrix products if the hardware supports them, else float32"
    )
    compile: Literal["auto", True, False] = Field(
        default="auto",
        description="torch.compile the operations between matrix products; auto: in long runs, if there is a compiler",
    )
    deterministic: bool = Field(
        default=False,
        description="on a GPU, always sum gradients in the same order, so that a resumed run gives exactly the same "
        "weights; slower. On a CPU, the same number of threads is enough",
    )


def _range(workers: int | str) -> int | str:
    if isinstance(workers, str) and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", workers):
        raise PydanticCustomError("workers", "input should be a number of workers, or a range such as 2:8")
    return workers


class ScaleConfig(Section):
    """The resources of the run."""

    workers: Annotated[PositiveInt | str, AfterValidator(_range), Flag("--workers")] = Field(
        default=1, description="number of workers; 2:8: between 2 and 8, as many as fit on the cluster"
    )
    cpus_per_worker: Annotated[PositiveFloat, Flag("--cpus-per-worker")] = 1.0
    gpus_per_worker: Annotated[NonNegativeFloat, Flag("--gpus-per-worker")] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="most restarts without a new checkpoint after a worker or node is lost; restarts after preemption "
        "notices do not count",
    )
    resize_seconds: PositiveFloat = Field(
        default=60.0, description="with workers 2:8: seconds between checks for room for more workers"
    )

    @property
    def fewest(self) -> int:
        """The smallest number of workers with which the run starts."""
        return int(str(self.workers).split(":")[0])

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return int(str(self.workers).split(":")[-1])

    @model_validator(mode="after")
    def _gpus_can_be_given(self) -> ScaleConfig:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                f"scale.gpus_per_worker is {self.gpus_per_worker:g}: give a whole number, or a fraction below 1"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> ScaleConfig:
        if self.fewest > self.most:
            raise ValueError(
                f"scale.workers is {self.workers}; write the smaller number first: {self.most}:{self.fewest}"
            )
        return self


class EvalConfig(Section):
    """Validation while training."""

    every: PositiveInt | None = Field(
        default=None, description="steps between validations; default: about ten in a run"
    )
    max_tokens: PositiveInt | None = Field(default=None, description="most tokens to validate on; default: all")
    cluster: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="field of validation rows with a value that related rows share, such as a passage's id. A sweep's "
        "statistics resample these clusters. Default: clusters are documents, conversations, or the prompts of pairs",
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        default=3, description="prompts that the model answers before the first step and at each validation"
    )
    prompts: list[str] = Field(
        default_factory=list,
        description="these prompts; default: drawn from the validation data, the same for all trials",
    )
    sample_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    tasks: list[str] = Field(
        default_factory=list,
        description="benchmarks to run at validations, such as [mm_demo, arc_easy]; the results are named task/NAME",
    )
    task_path: str | None = Field(default=None, description="folder with tasks of your own, as in eval --task-path")
    task_limit: PositiveInt | None = Field(default=100, description="most items of each task; null: all")
    tasks_every: PositiveInt = Field(
        default=1, description="validations between runs of the tasks; the last validation always runs them"
    )


class GenerationConfig(Section):
    """How the trained model answers if its user says nothing else: generation_config.json of each checkpoint.

    A key that is not set stays as in the base's file.
    """

    temperature: NonNegativeFloat | None = Field(default=None, description="0: always take the likeliest token")
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01)] | None = None
    max_new_tokens: PositiveInt | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are set, by name."""
        return {key: value for key, value in self.model_dump().items() if value is not None}

    def updated(self, other: GenerationConfig) -> GenerationConfig:
        """Return these settings with those that are set in `other` in their place."""
        return self.model_copy(update=other.given)


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay."""

    every: PositiveInt | None = Field(
        default=None, description="steps between checkpoints; default: at each validation"
    )
    keep: PositiveInt = Field(default=2, description="number of latest checkpoints to keep, in addition to the best")


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: Annotated[PositiveInt, Flag("--rank", vary=True)] = 8
    alpha: PositiveFloat | None = Field(default=None, description="default: the rank, for a scale of 1, as in MiniMind")
    dropout: Annotated[Probability, Movable()] = 0.0
    targets: str | Annotated[list[str], Field(min_length=1)] = Field(
        default="square", description="square (as in MiniMind), all-linear, or names such as [q_proj, v_proj]"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(default=False, description="train magnitude and direction separately (Liu et al. 2024)")

    @property
    def scale(self) -> float:
        """The factor of the product B·A."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank


class TrackConfig(Section):
    """Trackers that get a run's metrics in addition to its own files."""

    to: list[str] = Field(
        default=["wandb"], description=f"trackers: a list of {', '.join(TRACKER_RECORDS)}; empty: none"
    )
    wandb: Annotated[Literal["auto", "online", "offline", "off"], Flag("--wandb")] = Field(
        default="auto", description="auto: online with a key, else offline"
    )
    swanlab: Literal["auto", "online", "offline"] = Field(
        default="auto", description="if `to` names it; auto: online with a key, else offline"
    )
    project: str = Field(default="minimind-ray", pattern=r"^[^/\\#?%:,]+$", max_length=128)
    entity: str | None = Field(default=None, description="W&B's entity, SwanLab's workspace")
    group: str | None = Field(
        default=None, max_length=128, description="group of runs; default in a sweep: the sweep's name"
    )
    name: str | None = Field(default=None, max_length=128, description="default: the last part of out")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default_factory=list)
    artifacts: bool = Field(
        default=False, description="W&B: log data and models as artifacts, by reference, to show their lineage"
    )
    alerts: bool | list[AlertKind] = Field(
        default=False, description=f"alert the user: true, false, or a list of {', '.join(ALERTS)}"
    )

    def alerts_of(self, kind: AlertKind) -> bool:
        """Whether the user wants an alert of this kind of event."""
        return kind in self.alerts if isinstance(self.alerts, list) else self.alerts

    @field_validator("alerts", mode="before")
    @classmethod
    def _known_alerts(cls, alerts: Any) -> Any:
        kinds = list(ALERTS)
        if isinstance(alerts, bool) or isinstance(alerts, list) and all(kind in kinds for kind in alerts):
            return alerts
        raise ValueError(f"track.alerts: write true, false, or a list of {', '.join(kinds)}, not {alerts!r}")

    @field_validator("to")
    @classmethod
    def _known_trackers(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in TRACKER_RECORDS:
                raise ValueError(f"track.to: there is no tracker {name}; known are: {', '.join(TRACKER_RECORDS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"track.to names a tracker twice: {', '.join(names)}; name each once")
        return names


S = TypeVar("S", bound=Section)


class CommonConfig(Section):
    """The config of a run, without the sections that belong to single stages."""

    stage: StageName
    out: Annotated[Location, Flag("--out", verbatim=True, note="the run directory")] = Field(
        default="runs/{stage}", description="run directory; {stage} is replaced"
    )
    init_from: Annotated[Location | None, Flag("--init-from", verbatim=True)] = Field(
        default=None, description="base model: a run or checkpoint, a Hugging Face directory, or a model of the hub"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    scale: ScaleConfig = ScaleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    lora: LoraConfig = LoraConfig()
    generation: GenerationConfig = GenerationConfig()
    track: TrackConfig = TrackConfig()

    @property
    def record(self) -> StageRecord:
        """The stage's record in the table of stages."""
        return STAGES[self.stage]

    @property
    def own_section(self) -> Section | None:
        """The stage's own section, if the stage has one."""
        return getattr(self, self.stage) if self.record.section else None

    def own(self, kind: type[S]) -> S:
        """Return the stage's own section. Its type must be `kind`."""
        section = self.own_section
        assert isinstance(section, kind), f"stage {self.stage} has no {kind.__name__}"
        return section

    @property
    def trains_adapter(self) -> bool:
        """Whether the run trains an adapter and freezes all other weights."""
        adapters = self.record.adapters
        return adapters == "always" or adapters != "never" and attrgetter(adapters)(self)

    def packs_per_step(self) -> int:
        """Return the number of packs in one optimizer step, over all workers.

        Raises:
            UserError: batch.tokens is not a multiple of data.pack_tokens, or there are fewer packs than workers.
        """
        tokens, pack, workers = self.batch.tokens, self.data.pack_tokens, self.scale.most
        if tokens < pack:
            raise UserError(f"batch.tokens {tokens} is less than a pack: raise it to {pack}, or lower data.pack_tokens")
        if tokens % pack:
            raise UserError(
                f"batch.tokens {tokens} is not a multiple of data.pack_tokens {pack}; "
                f"the nearest that are: {tokens // pack * pack} and {(tokens // pack + 1) * pack}"
            )
        if tokens // pack < workers:
            raise UserError(
                f"batch.tokens {tokens} is {tokens // pack} packs of {pack} tokens, fewer than scale.workers "
                f"{workers}; "
                "raise batch.tokens or lower data.pack_tokens"
            )
        return tokens // pack


def own_sections(records: Iterable[StageRecord]) -> dict[str, Any]:
    """Return the type and the default of each stage's own section, whose name no other key of the config may have."""
    sections: dict[str, Any] = {}
    for record in records:
        if record.section:
            taken = record.name in CommonConfig.model_fields
            assert not taken, f"the section of stage {record.name} would replace config key {record.name}"
            sections[record.name] = (record.section, record.section())
    return sections


if TYPE_CHECKING:

    class Config(CommonConfig):
        """One stage's run. Read a stage's own section by `Config.own`."""

else:
    Config = create_model(
        "Config",
        __base__=CommonConfig,
        __module__=__name__,
        __doc__="One stage's run: the common sections, and one for each stage that has a section of its own.",
        **own_sections(STAGES.values()),
    )
