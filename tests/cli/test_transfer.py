"""import, export and lora merge: what comes back is what went out, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind_ray.cli.options import require_new
from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, load_shape, model_fingerprint, save_model
from minimind_ray.model.lora import load_adapter
from minimind_ray.model.minimind_pth import export_pth
from minimind_ray.model.transformer import Transformer
from tests.cli.conftest import Command, Models

pytestmark = [pytest.mark.unit, pytest.mark.slow]


def test_a_model_goes_to_pth_and_back(command: Command, models: Models, tmp_path: Path) -> None:
    file, back = tmp_path / "model.pth", tmp_path / "back"
    told = command("export", models.run, file, "--float32").out.splitlines()[1]
    assert told.startswith("MiniMind needs these settings in its MiniMindConfig") and "num_attention_heads = 4" in told
    outcome = command("import", file, back, "--tokenizer", models.tokenizer)
    assert "Qwen3ForCausalLM" in outcome.out and "4 heads, 2 key heads" in outcome.out
    assert "assumed (not in the file): --rope-theta 1e+06 --no-inference-rope-scaling " in outcome.out
    assert model_fingerprint(back) == model_fingerprint(models.base)
    half = tmp_path / "half.pth"
    assert command("export", models.base, half).code == 0
    assert half.stat().st_size < 0.6 * file.stat().st_size


def test_what_a_pth_file_does_not_say_is_printed_and_can_be_given(
    command: Command, models: Models, tmp_path: Path
) -> None:
    experts = ModelConfig(preset="tiny", num_experts=3, num_experts_per_tok=2, norm_topk_prob=False)
    file, tokenizer = tmp_path / "model.pth", Tokenizer.load(models.tokenizer)
    save_model(Transformer(experts.shape(tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    told = command("export", tmp_path / "model", file).out
    assert "num_experts_per_tok = 2" in told and "norm_topk_prob = False" in told
    plain = command("import", file, tmp_path / "plain", "--tokenizer", models.tokenizer)
    assert "--experts-per-token 1 --norm-topk-prob --router-aux-loss-coef 0.0005 hidden_act silu" in plain.out
    options = ["--experts-per-token", 2, "--no-norm-topk-prob", "--dropout", 0.1]
    given = command("import", file, tmp_path / "given", "--tokenizer", models.tokenizer, *options)
    assert "norm-topk-prob" not in given.out and "--router-aux-loss-coef" in given.out
    shape = load_shape(tmp_path / "given")
    assert (shape.num_experts_per_tok, shape.norm_topk_prob, shape.dropout) == (2, False, 0.1)


def test_an_adapter_goes_to_pth_and_back(command: Command, models: Models, tmp_path: Path) -> None:
    file, back = tmp_path / "lora.pth", tmp_path / "back"
    assert command("export", models.adapter, file, "--float32").code == 0
    assert command("import", file, back, "--base", models.run).code == 0
    before, after = (load_file(d / "adapter_model.safetensors") for d in (models.adapter, back))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    # The base is named, so the adapter can be used by itself.
    assert command("generate", back, "--prompt", "hi", "--max-new-tokens", 1).code == 0


def test_a_hugging_face_directory_is_read_and_written_as_ours(command: Command, models: Models, tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    shutil.copytree(models.base, source)
    (source / "modeling_evil.py").write_text("raise SystemExit('run')")
    weights = load_file(source / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, source / "model.safetensors")
    assert command("import", source, tmp_path / "ours").code == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == names
    back = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(back[k], v.bfloat16().float()) for k, v in weights.items())


def test_merged_weights_compute_what_base_and_adapter_do(command: Command, models: Models, tmp_path: Path) -> None:
    base = tmp_path / "moved"
    shutil.copytree(models.base, base)
    merged = tmp_path / "merged"
    assert command("lora", "merge", models.adapter, merged, "--base", base).code == 0
    adapted = load_model(models.base)
    load_adapter(adapted, models.adapter, model_fingerprint(models.base))
    tokens_N, bounds_D1 = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    with torch.no_grad():
        theirs, ours = (m.eval()(tokens_N, bounds_D1) for m in (adapted, load_model(merged)))
        plain = load_model(models.base).eval()(tokens_N, bounds_D1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, theirs, atol=1e-2)


BAD = [
    (["import", "/nowhere.pth", "{new}"], "/nowhere.pth: no such file"),
    (["import", "{file}", "{new}"], "give the tokenizer with --tokenizer"),
    (["import", "{file}", "{new}", "--tokenizer", "/nowhere"], "this is not a tokenizer directory"),
    (["import", "{file}", "{new}", "--tokenizer", "{tokenizer}"], "model.layers.0.self_attn.q_proj.weight is missing"),
    (["import", "{file}", "{base}"], "exists already"),
    (["import", "{adapter}", "{new}"], "is an adapter and needs no import"),
    (["import", "{tokenizer}", "{new}"], "is not a model"),
    (["import", "{broken}", "{new}"], "model.norm.weight is [3], not [64]"),
    (["import", "{base}", "{new}", "--tokenizer", "{large}"], "tokens, fewer than the"),
    (["import", "{whole}", "{new}", "--tokenizer", "{tokenizer}", "--experts-per-token", "3"], "has no experts; leave"),
    (["import", "{whole}", "{new}", "--tokenizer", "{tokenizer}", "--rms-norm-eps", "0"], "should be greater than 0"),
    (["import", "{file}", "{new}", "--base", "{base}"], "not a MiniMind LoRA file"),
    (["import", "{file}", "{new}", "--base", "{adapter}"], "--base {adapter} is an adapter, not a whole model"),
    (["import", "{base}", "{new}", "--heads", "2"], "in its config.json: leave --heads out"),
    (["import", "{file}", "{new}", "--base", "{base}", "--heads", "2"], "leave --heads out"),
    (["import", "{file}", "{new}", "--base", "{base}", "--tokenizer", "{base}"], "leave --tokenizer out"),
    (["export", "{base}", "{new}", "--base", "{base}"], "is a whole model: leave --base out"),
    (["export", "/nowhere", "{new}"], "/nowhere is not a model"),
    (["export", "{base}", "{file}/x.pth"], "few.pth: File exists"),
    (["export", "{base}", "{file}"], "exists already"),
    (["export", "{adapter}", "{new}", "--base", "{other}"], "not on this model"),
    (["export", "{adapter}", "{new}", "--base", "/nowhere"], "its base /nowhere is missing"),
    (["lora", "merge", "{base}", "{new}"], "is a whole model, not an adapter"),
    (["lora", "merge", "{adapter}", "{base}"], "exists already"),
    (["lora", "merge", "{adapter}", "{new}", "--base", "{other}"], "not on this model"),
    (["lora", "merge", "{adapter}", "{new}", "--base", "{adapter}"], "is an adapter, not a whole model"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args[:2]) + ": " + text for args, text in BAD])
def test_bad_input_is_one_sentence(
    command: Command, models: Models, tmp_path: Path, args: list[str], message: str
) -> None:
    weights = load_file(models.base / "model.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(models.base, broken)
    save_file({**weights, "model.norm.weight": torch.ones(3)}, broken / "model.safetensors")
    file = tmp_path / "few.pth"
    torch.save({"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, file)
    export_pth(models.base, tmp_path / "whole.pth")
    large = shutil.copytree(models.tokenizer, tmp_path / "large")
    content = json.loads((large / "tokenizer.json").read_text())
    added = [{**content["added_tokens"][0], "id": 499, "content": "<|more|>"}]
    (large / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], *added]}))
    places = {
        **vars(models), "file": file, "new": tmp_path / "new", "broken": broken, "whole": tmp_path / "whole.pth",
        "large": large,
    }  # fmt: skip
    outcome = command(*(arg.format_map(places) for arg in args))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message.format_map(places) in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["s3://bucket/x", "s3://KEY:hidden@bucket/x", "https://example.org/x", "file:///x"])
def test_a_local_path_is_no_url(where: str) -> None:
    with pytest.raises(UserError, match="is a URL, but this command writes local files") as error:
        require_new(Path(where))
    assert "hidden" not in str(error.value)
