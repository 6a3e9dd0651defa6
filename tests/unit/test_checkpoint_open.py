"""Contract: `open_checkpoint` describes a directory or GGUF file without reading weights, and
refuses what is broken or unsupported with one sentence that names the file and the field.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sixfold.common.checkpoint.checkpoint import Checkpoint, open_checkpoint
from sixfold.common.checkpoint.fields import Fields
from sixfold.common.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def directory(path: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def gguf_file(path: Path, arch: str = "llama", **fields: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    sizes = {
        "embedding_length": 32,
        "block_count": 6,
        "feed_forward_length": 8,
        "context_length": 64,
        "attention.head_count": 2,
    }
    known = {f"{arch}.{key}": value for key, value in sizes.items()}
    known[f"{arch}.attention.layer_norm_rms_epsilon"] = 1e-5
    known["tokenizer.ggml.tokens"] = ["<s>", "</s>", "<|im_end|>", "hello"]
    known["tokenizer.ggml.token_type"] = [3, 3, 3, 1]
    for key, value in (known | fields).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_directory(tmp_path: Path) -> None:
    found = open_checkpoint(directory(tmp_path / "Tiny-Llama"))
    assert isinstance(found, Checkpoint)
    assert (found.format, found.name, found.architecture) == ("safetensors", "Tiny-Llama", "llama")
    assert (found.vocab_size, found.context_length) == (100, 64)
    assert found.eos_token_ids == {2}
    assert found.bos_token_id is None
    assert found.config["rms_norm_eps"] == 1e-6
    assert found.config_file == tmp_path / "Tiny-Llama" / "config.json"


def test_a_hub_snapshot_is_named_after_its_repository(tmp_path: Path) -> None:
    path = tmp_path / "models--owner--Tiny-1B" / "snapshots" / "0123abc"
    path.parent.mkdir(parents=True)
    assert open_checkpoint(directory(path)).name == "owner/Tiny-1B"


def test_unknown_architectures_open(tmp_path: Path) -> None:
    """Whether one can be served is for the platform to say."""
    config = {"model_type": "toy", "vocab_size": 9, "max_position_embeddings": 5}
    assert open_checkpoint(directory(tmp_path, config)).architecture == "toy"


def test_every_source_of_end_tokens_counts(tmp_path: Path) -> None:
    added = [{"id": 7, "content": "<|eot|>"}, {"id": 8, "content": "<|other|>"}]
    path = directory(
        tmp_path,
        {**LLAMA, "eos_token_id": [2, 3]},
        generation_config={"eos_token_id": [3, 5, 100]},
        tokenizer_config={"eos_token": {"content": "<|eot|>"}},
        tokenizer={"version": "1.0", "added_tokens": added, "model": {}},
    )
    assert open_checkpoint(path).eos_token_ids == {2, 3, 5, 7}  # 100 is no token of this model


def test_no_end_token_is_allowed(tmp_path: Path) -> None:
    path = directory(tmp_path, {**LLAMA, "eos_token_id": None}, generation_config={})
    assert open_checkpoint(path).eos_token_ids == frozenset()


def test_text_part_of_a_multimodal_configuration(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "vocab_size": 300, "model_type": None}
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    found = open_checkpoint(directory(tmp_path, outer))
    assert found.architecture == "gemma3_text"
    assert found.vocab_size == 300
    assert found.eos_token_ids == {1, 106}
    assert found.config["query_pre_attn_scalar"] == 256
    assert found.config["num_attention_heads"] == 8
    assert found.config["tie_word_embeddings"] is True
    assert found.context_length == 131072


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_yarn_extends_the_context(key: str, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert open_checkpoint(directory(tmp_path, {**LLAMA, key: rope})).context_length == 256
    longer = {**LLAMA, key: rope, "max_position_embeddings": 300}
    assert open_checkpoint(directory(tmp_path, longer)).context_length == 300
    other = {**rope, "rope_type": "llama3"}
    assert open_checkpoint(directory(tmp_path, {**LLAMA, key: other})).context_length == 64


def test_mistral_has_a_window_unless_it_says_null(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "mistral"}
    assert open_checkpoint(directory(tmp_path, config)).config["sliding_window"] == 4096
    config["sliding_window"] = None
    assert open_checkpoint(directory(tmp_path, config)).config["sliding_window"] is None


@pytest.mark.parametrize("field", ["vocab_size", "model_type"])
def test_missing_field(field: str, tmp_path: Path) -> None:
    text = refusal(directory(tmp_path, {k: v for k, v in LLAMA.items() if k != field}))
    assert "config.json" in text
    assert repr(field) in text


@pytest.mark.parametrize("value", ["64", 0, -1, 2.5, True, [64]])
def test_context_length_of_a_wrong_kind(value: Any, tmp_path: Path) -> None:
    text = refusal(directory(tmp_path, {**LLAMA, "max_position_embeddings": value}))
    assert "max_position_embeddings" in text
    assert repr(value) in text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ['{"model_type": "llama",', "[1, 2]", "\xff\xfe"])
def test_broken_json_names_the_file(file: str, text: str, tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / file).write_bytes(text.encode("latin-1"))
    assert file in refusal(path)


def test_empty_directory_and_absent_path(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("method", ["bitsandbytes", "fbgemm_fp8", "hqq", "aqlm", None])
def test_other_quantised_directories_are_refused(method: str | None, tmp_path: Path) -> None:
    quantised = {"bits": 4, "quant_method": method} if method else {"bits": 4}
    text = refusal(directory(tmp_path, {**LLAMA, "quantization_config": quantised}))
    assert "quantization_config" in text
    assert (method or "unnamed method") in text
    assert "gptq (4 and 8 bits), awq (4 bits, version gemm), compressed-tensors" in text
    assert "bfloat16" in text
    assert "GGUF" in text


def test_gguf(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 0}
    found = open_checkpoint(gguf_file(tmp_path / "Tiny-Q4.gguf", **ids))
    assert (found.format, found.name, found.architecture) == ("gguf", "Tiny-Q4", "llama")
    assert (found.vocab_size, found.context_length) == (4, 64)
    assert found.eos_token_ids == {1, 2}  # the named one and the control token that ends a turn
    assert found.bos_token_id == 0
    assert found.config["tie_word_embeddings"] is True
    assert found.config["num_key_value_heads"] == 2


def test_gguf_end_of_turn_ids(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 0}
    path = gguf_file(tmp_path / "m.gguf", **ids, **{"tokenizer.ggml.token_type": [3, 3, 1, 1]})
    assert open_checkpoint(path).eos_token_ids == {0, 3}  # <|im_end|> is plain text here


def test_gguf_gemma_facts_that_the_file_lacks(tmp_path: Path) -> None:
    window = {"gemma3.attention.sliding_window": 512}
    config = open_checkpoint(gguf_file(tmp_path / "m.gguf", "gemma3", **window)).config
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 16
    local, full = (config["rope_parameters"][k] for k in ("sliding_attention", "full_attention"))
    assert (local["rope_theta"], full["rope_theta"]) == (10_000.0, 1_000_000.0)


def test_gguf_gemma_27b_scales_by_hidden_over_heads(tmp_path: Path) -> None:
    fields = {
        "gemma3.attention.sliding_window": 512,
        "gemma3.block_count": 62,
        "gemma3.attention.key_length": 8,
        "gemma3.attention.value_length": 8,
        "gemma3.rope.scaling.factor": 8.0,
    }
    config = open_checkpoint(gguf_file(tmp_path / "m.gguf", "gemma3", **fields)).config
    assert config["query_pre_attn_scalar"] == 16
    full = config["rope_parameters"]["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)


def test_gguf_yarn(tmp_path: Path) -> None:
    fields = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": 0.5,
    }
    found = open_checkpoint(gguf_file(tmp_path / "m.gguf", **fields))
    assert found.context_length == 256
    rope = found.config["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))


def test_gguf_llama_with_a_window_is_mistral(tmp_path: Path) -> None:
    found = open_checkpoint(gguf_file(tmp_path / "m.gguf", **{"llama.attention.sliding_window": 9}))
    assert (found.architecture, found.config["sliding_window"]) == ("mistral", 9)


@pytest.mark.parametrize(
    ("arch", "fields", "words"),
    [
        ("mamba", {}, ["'mamba'", "gemma3 llama qwen2 qwen3"]),
        ("llama", {"llama.expert_count": 8}, ["mixture-of-experts"]),
        ("llama", {"split.count": 3}, ["3 files", "--merge"]),
        ("llama", {"llama.block_count": None}, ["'block_count'"]),
        ("llama", {"llama.embedding_length": "wide"}, ["'embedding_length'", "'wide'"]),
        ("llama", {"llama.attention.value_length": 4}, ["attention.value_length"]),
        ("llama", {"llama.rope.scaling.type": "linear"}, ["rope.scaling.factor"]),
        ("llama", {"tokenizer.ggml.eos_token_id": "x"}, ["tokenizer.ggml.eos_token_id"]),
        ("llama", {"tokenizer.ggml.token_type": [1, 1]}, ["token_type", "4 numbers"]),
        ("qwen2", {"qwen2.attention.sliding_window": 9}, ["attention.sliding_window"]),
        ("gemma3", {}, ["attention.sliding_window"]),
    ],
)
def test_gguf_refusals(arch: str, fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", arch, **fields)
    text = refusal(path)
    assert str(path) in text
    for word in words:
        assert word in text


def test_no_framework_is_imported() -> None:
    """Opening the demo model and its tokenizer must work where there is no torch."""
    script = """
import sys
from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import load_tokenizer
assert load_tokenizer(open_checkpoint(resolve_model(""))).encode("hi")
print({"torch", "transformers", "gguf", "mlx"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_fields_read_what_they_say(tmp_path: Path) -> None:
    fields = Fields({"a": 3, "b": 2.5, "c": True, "d": "x", "e": None}, tmp_path)
    assert fields.integer("a") == 3
    assert fields.number("a") == 3.0
    assert fields.number("b") == 2.5
    assert fields.flag("c") is True
    assert fields.text("d") == "x"
    assert fields.integer("e", 9) == 9
    assert fields.flag("absent", False) is False
    wrong = [
        lambda: fields.integer("b"),
        lambda: fields.integer("c"),
        lambda: fields.number("d"),
        lambda: fields.number("c"),
        lambda: fields.flag("a"),
        lambda: fields.text("a"),
        lambda: fields.text("e"),
    ]
    for read in wrong:
        with pytest.raises(CheckpointError):
            read()
