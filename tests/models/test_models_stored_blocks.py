"""Contract: GGUF's quantised blocks are served in the precision that the file has. Taken apart they
stand for the values that the `gguf` package reads; a model on them differs from the dequantised one
by the rounding of activations alone; and what is kept is decided with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from run_model import load, load_native, load_on_cpu, logits
from tiny_gguf import write_model
from tiny_models import GEMMA3, TINY, Tiny
from tiny_models import prompt as tokens

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.gguf_blocks import SCHEMES, take_apart
from sixfold.common.checkpoint.gguf_types import SUPPORTED
from sixfold.common.errors import KernelError
from sixfold.models.loading import kernel_problems
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.cpu.packing import pack_stored, unpack

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]} | {
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
WIDE = Tiny("Llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
native = pytest.mark.skipif(missing() is not None, reason="no native kernels here")


@pytest.mark.parametrize("kind", sorted(HALVES))
def test_blocks_taken_apart_stand_for_their_values(kind: str) -> None:
    rng = np.random.default_rng(3)
    block = next(b for b in SUPPORTED.values() if b.name == kind)
    rows, columns = 21, 512
    raw = rng.integers(0, 256, (rows * columns // block.elements, block.nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = (rng.normal(size=len(raw)) * 0.01).astype(np.float16)
        raw[:, at : at + 2] = halves[:, None].view(np.uint8)
    want = np.empty((len(raw), block.elements), np.float32)
    block.convert(raw, want)
    found = take_apart(block, raw, rows)
    assert found.shape == (rows, columns)
    values = unpack(pack_stored(found)).numpy()
    # Scales of the K types are products of an fp16 number and a small integer, kept as fp16.
    exact = not kind.endswith("_K")
    tolerance = 1e-7 if exact else 1e-3 * float(np.abs(want).max())
    np.testing.assert_allclose(values, want.reshape(rows, columns), atol=tolerance, rtol=1e-6)


def test_every_quantised_type_has_a_scheme() -> None:
    assert {k.lower() for k in HALVES} == SCHEMES
    floats = {"F32", "F16", "BF16"}
    assert {b.name for b in SUPPORTED.values()} == set(HALVES) | floats


@native
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize(
    ("arch", "tiny"),
    [
        ("llama", WIDE),
        ("qwen2", TINY["qwen2"]),
        ("gemma3", Tiny("Gemma3", {**GEMMA3, "query_pre_attn_scalar": 32})),
    ],
)
def test_a_model_on_blocks_equals_the_dequantised_one(
    arch: str, tiny: Tiny, kind: Kind, tmp_path: Path
) -> None:
    oracle = tiny.model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", arch, oracle.config, state, kind)
    problems = kernel_problems(open_checkpoint(path), "float32", "stored")
    assert {p.weights for p in problems} == {"", kind.name.lower()}
    model = load_native(path)
    assert not [n for n, p in model.named_parameters() if p.dim() == 2], "a dequantised copy"
    found, want = logits(model, tokens()), logits(load(path), tokens())
    error = float((found - want).norm() / want.norm())
    assert error < 0.1, "other weights would be off by more than one"
    assert error > 0, "eight-bit activations leave a trace"


@native
@pytest.mark.parametrize(
    ("fields", "chosen", "because"),
    [
        ({}, "q4_1", "kept as the checkpoint stores them"),
        ({"quantize": "none"}, "float32", "set by the user"),
        ({"quantize": "int8"}, "int8", "set by the user"),
        ({"dtype": "float32"}, "float32", "dtype was set by the user"),
        ({"kernels": {"linear": "generic"}}, "float32", "no kernel for q4_1"),
    ],
)
def test_how_matrices_are_kept_is_decided(
    fields: dict[str, object], chosen: str, because: str, tmp_path: Path
) -> None:
    oracle = WIDE.model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state, Kind.Q4_1)
    loaded = load_on_cpu(path, **fields)
    decision = {d.what: d for d in loaded.decisions}["weights"]
    assert decision.chosen == chosen
    assert because in decision.because
    numbers = sum(v.size for v in state.values())
    bits = {"q4_1": 5.0, "int8": 8.5, "float32": 32.0}[chosen]
    assert loaded.weight_bytes == pytest.approx(numbers * bits / 8, rel=0.05)


@native
def test_what_no_kernel_keeps_is_refused(tmp_path: Path) -> None:
    oracle = WIDE.model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state)
    with pytest.raises(KernelError, match="has no int4 weights"):
        load_on_cpu(path, quantize="int4", kernels={"linear": "generic"})
    with pytest.raises(KernelError, match="computes in float32"):
        load_on_cpu(path, quantize="int8", dtype="bfloat16")
