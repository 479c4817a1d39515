"""Configs: every wrong one names the key, the value, what is allowed, and the nearest valid key."""

from pathlib import Path

import pytest
import yaml

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import config_keys, load_config, parse_override, read_yaml, to_yaml
from minimind_ray.config.reading import dump_yaml, parse_yaml
from minimind_ray.config.schema import PRESETS, ModelConfig
from minimind_ray.sweep.axes import Grid, parse_axis

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.unit

WRONG = [
    ({"optim.lrr": 1}, ["optim.lrr", "did you mean optim.lr?", "optim.weight_decay"]),
    ({"lr": 1}, ["lr", "did you mean optim.lr?"]),
    ({"opt.lr": 1}, ["opt", "did you mean optim?"]),
    ({"optim.lr": "x"}, ["optim.lr", "the command line", "valid number", "'x'"]),
    ({"scale.workers": "2:x"}, ["scale.workers", "2:8", "'2:x'"]),
    ({"optim.weight_decay": True}, ["optim.weight_decay", "number", "not true"]),
    ({"train.compile": "yes"}, ["train.compile", "'auto', true or false", "'yes'"]),
    ({"train.deterministic": "on"}, ["train.deterministic", "write true or false, not 'on'"]),
    ({"track.wandb": False}, ["track.wandb", "'off', not false"]),
    ({"optim.lr": -1}, ["optim.lr", "greater than 0", "-1"]),
    ({"optim.lr": float("nan")}, ["optim.lr", "finite"]),
    ({"data.train": 3}, ["data.train", "valid string", "3"]),
    ({"data.pack_tokens": 10}, ["data.pack_tokens", "data.max_seq_len"]),
    ({"optim.lr.x": 2}, ["optim.lr.x", "single value"]),
    ({"model.preset": "huge"}, ["model.preset", "minimind-3", "'huge'"]),
    ({"train.epochs": 1.5}, ["train.epochs", "integer", "1.5"]),
    ({"schedule.name": "cos"}, ["schedule.name", "cosine", "'cos'"]),
    ({"model": 3}, ["model", "not a section"]),
    ({"dpo.label_smoothing": 0.5}, ["dpo.label_smoothing", "less than 0.5"]),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=[next(iter(o)) for o, _ in WRONG])
def test_wrong_values_are_named(overrides: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load_config("pretrain", overrides=overrides)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_later_sources_win_and_files_are_named(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim:\n  lr: 0.01\n  clip: 2\n")
    config = load_config("pretrain", [file], {"optim.lr": 0.5})
    assert (config.optim.lr, config.optim.clip, config.optim.beta1) == (0.5, 2, 0.9)
    file.write_text("optim:\n  lr: fast\n")
    with pytest.raises(UserError, match="a.yaml"):
        load_config("pretrain", [file])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "a.yaml:"),
        ("- 1", "mapping"),
        ("stage: sft", "stage is sft"),
        ("optim:\n  lr: 1\ndata: {}\noptim:\n  clip: 2\n", "a.yaml:4: .*key optim appears twice"),
        ("optim: {lr: 1, 'lr': 2}", "a.yaml:1: .*key lr appears twice"),
        ("!!python/object/apply:os.getcwd []", "a.yaml:1"),
        ("train:\n  seed: !!int 1_000", "a.yaml:2: .*'1_000' is not !!int"),
        ("optim: {lr: !!float 1_0.5}", "a.yaml:1: .*'1_0.5' is not !!float"),
        ("data: {cache: !!bool yes}", "a.yaml:1: .*'yes' is not !!bool"),
        ("train: {max_steps: !!null 0}", "a.yaml:1: .*'0' is not !!null"),
        ("track: {name: !!timestamp 2026-01-01}", "a.yaml:1: .*the tag !!timestamp is unknown: remove it"),
        ("optim: {lr: 1}\n<<: 3\n", r"a.yaml:2: not valid YAML: << needs a mapping, such as \*name, or a list of"),
        ("a: &a {lr: 1}\noptim:\n  <<: [*a, 3]\n", "a.yaml:3: not valid YAML: << needs a mapping"),
    ],
)
def test_bad_files(tmp_path, text: str, words: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config("pretrain", [file])
    with pytest.raises(UserError, match="cannot be read"):
        load_config("pretrain", [tmp_path / "none.yaml"])


def test_a_recipe_or_a_sweep_is_no_config(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text, command in {"stages: []": "minimind-ray run", "axes: {}": "minimind-ray tune --sweep"}.items():
        file.write_text(text)
        with pytest.raises(UserError, match=command):
            load_config("sft", [file])


def test_files_win_over_a_sweeps_settings(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {epochs: 3}")
    config = load_config("sft", [file], trees={"sweep": {"train": {"epochs": 10, "seed": 4}}})
    assert (config.train.epochs, config.train.seed) == (3, 4)


def test_merge_keys_stay_and_a_stage_is_not_set(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: &a {lr: 0.5, clip: 2}\nmore: {<<: *a, lr: 0.1}\n")
    assert read_yaml(tmp_path / "a.yaml")["more"] == {"lr": 0.1, "clip": 2}
    with pytest.raises(UserError, match="stage=dpo is set, but the command trains sft"):
        load_config("sft", overrides={"stage": "dpo"})


def test_yaml_round_trip() -> None:
    config = load_config("dpo", overrides={"data.train": ["a", "b"], "model.rope_scaling": {"factor": 4.0}})
    tree = yaml.safe_load(to_yaml(config))
    assert load_config("dpo", overrides=tree) == config


def test_overrides_are_read_as_yaml() -> None:
    assert parse_override("optim.lr=1e-4") == ("optim.lr", 1e-4)
    assert parse_override("data.train=[a, b]") == ("data.train", ["a", "b"])
    assert parse_override("train.compile=true") == ("train.compile", True)
    with pytest.raises(UserError, match="key=value"):
        parse_override("optim.lr")


@pytest.mark.parametrize("text", ["track: {wandb: off}", 'track: {wandb: "off"}'])
def test_off_is_a_word_to_wandb(tmp_path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert load_config("sft", [file]).track.wandb == "off"
    key, value = parse_override("track.wandb=off")
    assert load_config("sft", overrides={key: value}).track.wandb == "off"


def test_names_that_stay() -> None:
    keys = set(config_keys())
    promised = {
        "data.train", "data.val", "data.tokenizer", "data.max_seq_len", "data.pack_tokens", "model.preset", "init_from",
        "batch.tokens", "optim.lr", "optim.weight_decay", "optim.clip", "schedule.name", "schedule.warmup",
        "train.epochs", "train.max_steps", "train.seed", "train.precision", "scale.workers", "scale.gpus_per_worker",
        "scale.cpus_per_worker", "scale.max_failures",
        "eval.every", "checkpoint.every", "lora.rank", "dpo.beta", "dpo.loss", "track.wandb",
    }  # fmt: skip
    assert promised <= keys


def test_shapes() -> None:
    for preset in PRESETS:
        assert ModelConfig(preset=preset).shape(6400).vocab_size == 6400
    with pytest.raises(UserError, match="does not divide"):
        ModelConfig(preset="tiny", hidden_size=65).shape(100)
    with pytest.raises(
        UserError, match="^model.num_attention_heads 4 is not a multiple of model.num_key_value_heads 3$"
    ):
        ModelConfig(preset="tiny", num_key_value_heads=3).shape(100)
    with pytest.raises(UserError, match=r"model.n_shared_experts needs model.num_experts and model.qk_norm false"):
        ModelConfig(preset="minimind-3-moe", n_shared_experts=1).shape(100)
    with pytest.raises(UserError, match=r"model.qkv_bias needs model.qk_norm false"):
        ModelConfig(preset="tiny", qkv_bias=True).shape(100)
    with pytest.raises(UserError, match=r"model.norm_topk_prob must be true"):
        ModelConfig(preset="minimind-2-moe", norm_topk_prob=False).shape(100)
    with pytest.raises(UserError, match="model.vocab_size"):
        ModelConfig(preset="tiny", vocab_size=50).shape(100)


def test_packs_per_step() -> None:
    with pytest.raises(UserError, match="less than a pack: raise it to 4096"):
        load_config("pretrain", overrides={"batch.tokens": 1024}).packs_per_step()
    assert load_config("pretrain", overrides={"batch.tokens": 8192}).packs_per_step() == 2
    with pytest.raises(UserError, match="8192 and 12288"):
        load_config("pretrain", overrides={"batch.tokens": 9000}).packs_per_step()
    with pytest.raises(UserError, match="fewer than scale.workers"):
        load_config("pretrain", overrides={"batch.tokens": 8192, "scale.workers": 3}).packs_per_step()


def test_a_range_of_workers_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("scale: {workers: 2:8}\nbatch: {tokens: 32768}\n")
    config = load_config("pretrain", [tmp_path / "config.yaml"])
    assert (config.scale.fewest, config.scale.most) == (2, 8) and parse_override("scale.workers=2:8")[1] == "2:8"
    assert load_config("pretrain", trees={"again": yaml.safe_load(to_yaml(config))}) == config
    assert (config.scale.model_copy(update={"workers": 3}).fewest, load_config("pretrain").scale.most) == (3, 1)
    with pytest.raises(UserError, match="fewer than scale.workers 9"):
        load_config("pretrain", overrides={"scale.workers": "2:9", "batch.tokens": 32768}).packs_per_step()
    with pytest.raises(UserError, match="write the smaller number first: 2:8"):
        load_config("pretrain", overrides={"scale.workers": "8:2"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5e3", 500.0), ("5.", 5.0), ("-2e+3", -2000.0), ("010", 10), ("+7", 7),
        ("0x1F", 31), ("0o17", 15), ("-.inf", float("-inf")), ("true", True), ("~", None), ("null", None),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("yes", "yes"), ("No", "No"),
        ("on", "on"), ("off", "off"), ("0b1", "0b1"), ("=", "="), ("inf", "inf"), ("nan", "nan"), ('"1e-4"', "1e-4"),
        ("!!str 010", "010"), ("!!int 010", 10), ("!!float 1", 1.0), ("!!float 1e-4", 1e-4), ("!!bool true", True),
    ],
)  # fmt: skip
def test_a_value_means_the_same_in_files_lists_and_flags(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"single: {text}\nlist: [{text}]\n")
    assert read_yaml(file) == {"single": value, "list": [value]}
    assert parse_override(f"key={text}") == ("key", value)
    assert value is None or parse_axis("data.format", text) == Grid("data.format", (value,))
    assert parse_yaml(dump_yaml({"key": [value]})) == {"key": [value]}


@pytest.mark.parametrize("text", ["1e-4", "010", "0o7", "yes", "2026-01-01", "1:30", "null", "", "=", "1_000", ".5e3"])
def test_a_text_stays_a_text_for_every_reader_of_a_config(text: str) -> None:
    config = load_config("sft", overrides={"track.name": text})
    assert yaml.safe_load(to_yaml(config))["track"]["name"] == text
    assert load_config("sft", trees={"again": parse_yaml(to_yaml(config))}) == config


@pytest.mark.parametrize(
    "text", ['optim: {lr: "1e-4"}', "optim: {clip: 1_000}", "dpo: {lora: yes}", "train: {seed: 1e1}"]
)
def test_no_text_is_taken_for_a_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="a.yaml"):
        load_config("dpo", [tmp_path / "a.yaml"])


def test_shipped_files_say_the_same_to_other_readers() -> None:
    files = [*ROOT.glob("*.yaml"), *ROOT.glob("cluster/*.yaml"), *ROOT.glob("experiments/**/*.yaml")]
    assert len(files) == 17
    for file in files:
        assert read_yaml(file) == yaml.safe_load(file.read_text()), file
