"""The table of stages: a record of each stage's name, data, defaults and metrics. `stages/<name>.py` has its functions.

To add a stage, add a record here, a file `stages/<name>.py`, an experiment in YAML and a test. A stage's own settings
are a section of the config under the stage's name. Declare this section here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from minimind_ray.config.flag import Flag, Movable
from minimind_ray.config.section import NonNegativeFloat, PositiveFloat, Section

RowKind = Literal["text", "conversation", "pair"]
Mode = Literal["min", "max"]

CLUSTERS: dict[RowKind, str] = {"text": "documents", "conversation": "conversations", "pair": "prompts"}
"""What makes validation examples belong together (see data/clusters.py), by the kind of the rows."""


class DpoConfig(Section):
    """Preference optimisation."""

    beta: Annotated[PositiveFloat, Flag("--beta", vary=True), Movable()] = 0.1
    loss: Annotated[Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"], Flag("--loss", vary=True)] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Movable()] = Field(
        default=0.0, description="assumed fraction of pairs with swapped labels (conservative DPO)"
    )
    simpo_gamma: Annotated[NonNegativeFloat, Movable()] = Field(
        default=1.0, description="SimPO's target margin over beta-scaled rewards"
    )
    lora: bool = Field(default=False, description="train adapters (section lora) instead of all weights")


@dataclass(frozen=True)
class StageRecord:
    """The record of a stage.

    rows: the kind of a row of its data.
    about: what the stage learns from what, in one line.
    needs_base: whether a run starts from a trained model (`init_from`).
    adapters: whether a run trains adapters: "never", "always", or the config key of the bool that says so.
    section: the stage's own section of the config; its key is the stage's name.
    defaults: the stage's defaults that differ from the schema's.
    metrics: the validation metrics by which a sweep can be judged, and whether less or more is better.
    judged_by: the metric that a sweep is judged by if the user names none.
    """

    name: str
    rows: RowKind
    about: str = ""
    needs_base: bool = True
    adapters: str = "never"
    section: type[Section] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Mapping[str, Mode] = field(default_factory=lambda: PER_TOKEN)
    judged_by: str = "val/loss"

    def clusters(self, field: str | None) -> str:
        """Return the noun for clusters of validation examples. `field` is `eval.cluster`."""
        return f"values of {field}" if field else CLUSTERS[self.rows]


PER_TOKEN: dict[str, Mode] = {"val/loss": "min", "val/bits_per_byte": "min"}
"""The metrics of a stage whose loss is per token."""

# Learning rates are MiniMind's own.
PRETRAIN = StageRecord(
    name="pretrain",
    rows="text",
    about="a new model learns to continue texts",
    needs_base=False,
    defaults={"optim": {"lr": 5e-4}},
)
SFT = StageRecord(
    name="sft",
    rows="conversation",
    about="a pretrained model learns to answer, from conversations",
    defaults={"optim": {"lr": 1e-5}},
)
LORA = StageRecord(
    name="lora",
    rows="conversation",
    about="as sft; trains small adapters and leaves the model's weights as they are",
    adapters="always",
    defaults={"optim": {"lr": 1e-4}},
)
DPO = StageRecord(
    name="dpo",
    rows="pair",
    about="a model that answers learns to prefer the better answer, from pairs",
    adapters="dpo.lora",
    section=DpoConfig,
    defaults={"optim": {"lr": 5e-7}},
    # The default is the accuracy: the fraction of pairs whose chosen answer has gained on the rejected answer. It means
    # the same for every beta, loss and learning rate. Loss and margin depend on beta (as beta goes to 0, every model's
    # loss goes to ln 2), so they cannot compare two betas. The margin also grows without limit as the policy leaves the
    # reference.
    metrics={"val/accuracy": "max", "val/margin": "max", "val/loss": "min"},
    judged_by="val/accuracy",
)

STAGES: dict[str, StageRecord] = {record.name: record for record in (PRETRAIN, SFT, LORA, DPO)}


def _require_known(name: Any) -> Any:
    if not isinstance(name, str) or name not in STAGES:
        raise PydanticCustomError("stage", "Input should be {names}", {"names": one_of(map(repr, STAGES))})
    return name


StageName = Annotated[str, BeforeValidator(_require_known)]
"""The name of a stage in the table."""


def one_of(names: Iterable[str]) -> str:
    """Return the names for a sentence: a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
