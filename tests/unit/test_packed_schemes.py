"""Contract: matrices packed as GPTQ, AWQ and compressed-tensors define it are found, checked and
taken apart to the values that they stand for, exactly when converted, and with minimums rounded to
fp16 when kept. Oracle: `tiny_packed`, which writes number by number and shares no code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_packed import Form, Numbers, awq, compressed, gptq

from sixfold.common.checkpoint.packed_matrices import PackedMatrix, find_packed
from sixfold.common.checkpoint.packed_schemes import PACKED
from sixfold.common.checkpoint.quantization_config import packed_scheme
from sixfold.common.checkpoint.safetensors_index import read_tables
from sixfold.common.errors import CheckpointError
from sixfold.models.quantization import BITS
from sixfold.platforms.cpu.kernels import WEIGHTS
from sixfold.platforms.cpu.packing import pack_stored, unpack

GROUPS = (32, 64, 128, -1)
FORMS = {
    **{
        f"{form}-int{bits}-{'sym' if sym else 'asym'}-{size}": gptq(form, bits, size, symmetric=sym)
        for form in ("gptq", "gptq_v2")
        for bits in (4, 8)
        for sym in (True, False)
        for size in GROUPS
    },
    **{
        f"gptq-int{bits}-reordered-{size}": gptq("gptq", bits, size, reordered=True)
        for bits in (4, 8)
        for size in GROUPS
    },
    **{f"awq-{size}": awq(size) for size in GROUPS},
    **{
        f"packed-int{bits}-{'sym' if sym else 'asym'}-{size}": compressed(
            True, bits, size, symmetric=sym
        )
        for bits in (4, 8)
        for sym in (True, False)
        for size in GROUPS
    },
    "packed-int4-reordered": compressed(True, 4, 64, reordered=True),
    "packed-int4-bfloat16": compressed(True, 4, 64, scale_type=torch.bfloat16),
    "bytes-channel": compressed(False, 8, -1),
    "bytes-channel-asym": compressed(False, 8, -1, symmetric=False),
    "bytes-group": compressed(False, 8, 64),
    "bytes-float32-scales": compressed(False, 8, -1, scale_type=torch.float32),
}
MIDDLE = {"gptq": (40, 192), "awq": (40, 192)}
"""Outputs and inputs: of GPTQ multiples of 8 and 32, of AWQ of 8 and 8; 128 does not divide 192."""
ODD = (21, 77)  # compressed-tensors takes any


def sizes(form: Form) -> tuple[int, int]:
    method = form.config["quant_method"]
    return MIDDLE.get(method, (21, 192) if form.reordered or form.group_size == 128 else ODD)


def stored(path: Path, form: Form, numbers: Numbers) -> PackedMatrix:
    tensors = {f"a.b.{last}": tensor for last, tensor in form.write(numbers).items()}
    save_file({**tensors, "a.c.weight": torch.zeros(3, 3)}, path / "model.safetensors")
    scheme = packed_scheme({"quantization_config": form.config}, path)
    assert scheme is not None
    found = find_packed(read_tables(path), scheme)
    assert list(found) == ["a.b"], "a matrix in floats is not the scheme's"
    return found["a.b"]


def rounding(form: Form, numbers: Numbers) -> torch.Tensor:
    """How far kept values may be off: a minimum, zero * scale (zero - 128 for bytes), is rounded to
    the eleven bits of fp16; so are scales that have more."""
    if form.scale_type == torch.float32:
        return numbers.values.abs() * 2.0**-11
    if form.symmetric:
        return torch.zeros(numbers.q.shape)
    lift = numbers.zero - (0 if form.bits == 4 else 128)
    return (numbers.scale.float() * torch.from_numpy(lift)).abs()[:, numbers.group] * 2.0**-11


@pytest.mark.parametrize("name", FORMS)
def test_a_matrix_stands_for_its_values(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    numbers = form.draw(np.random.default_rng(len(name)), *sizes(form))
    matrix = stored(tmp_path, form, numbers)
    want = numbers.values
    assert matrix.shape == want.shape
    read = matrix.read()
    whole = np.concatenate([read.values(0, 5), read.values(5, len(want))])
    if form.scale_type == torch.float32:
        np.testing.assert_allclose(whole, want, rtol=1e-6)
    else:
        assert np.array_equal(whole, want.numpy()), "converted, nothing may be rounded"
    rows = matrix.quantised_rows()
    assert rows.bits == form.bits
    assert (rows.minimum is None) == form.symmetric
    permuted = form.reordered and form.group_size != -1
    assert (rows.order is not None) == permuted
    kept = unpack(pack_stored(rows))
    assert kept.shape == want.shape
    assert bool(((kept - want).abs() <= rounding(form, numbers)).all())


@pytest.mark.parametrize("name", ["gptq-int4-asym-64", "gptq-int8-sym-32", "awq-64"])
def test_a_wrong_zero_would_be_seen(name: str, tmp_path: Path) -> None:
    """One more in every zero is far outside the tolerance above."""
    form = FORMS[name]
    numbers = form.draw(np.random.default_rng(1), *sizes(form))
    off = replace(numbers, zero=(numbers.zero + 1) % (1 << form.bits))
    kept = unpack(pack_stored(stored(tmp_path, form, off).quantised_rows()))
    assert bool(((kept - numbers.values).abs() > 4 * rounding(form, numbers)).all())


def test_the_two_gptq_formats_differ_by_one(tmp_path: Path) -> None:
    first = FORMS["gptq-int4-sym-32"]
    numbers = first.draw(np.random.default_rng(1), 8, 64)
    read = stored(tmp_path, replace(first, config=FORMS["gptq_v2-int4-sym-32"].config), numbers)
    assert (read.read().zero == 7).all()


def test_a_stored_zero_of_all_ones_is_zero(tmp_path: Path) -> None:
    """ "gptq" stores 15 for a zero of 0: its sum with one is taken within four bits."""
    form = FORMS["gptq-int4-asym-32"]
    numbers = form.draw(np.random.default_rng(1), 8, 64)
    none = replace(numbers, zero=np.zeros_like(numbers.zero))
    assert (form.write(none)["qzeros"] == -1).all()
    assert (stored(tmp_path, form, none).read().zero == 0).all()


def test_gptq_without_an_index_has_groups_in_order(tmp_path: Path) -> None:
    form = gptq("gptq", 4, 64)

    def write(numbers: Numbers) -> dict[str, torch.Tensor]:
        return {k: v for k, v in form.write(numbers).items() if k != "g_idx"}

    numbers = form.draw(np.random.default_rng(1), 16, 192)
    read = stored(tmp_path, replace(form, write=write), numbers).read()
    assert np.array_equal(read.values(0, 16), numbers.values.numpy())


def test_a_symmetric_file_with_other_zeros_is_read_as_it_is(tmp_path: Path) -> None:
    """`sym` in the configuration is not relied on."""
    form = gptq("gptq", 4, 32, symmetric=True)
    numbers = replace(form, symmetric=False).draw(np.random.default_rng(1), 16, 64)
    rows = stored(tmp_path, form, numbers).quantised_rows()
    assert rows.minimum is not None
    torch.testing.assert_close(unpack(pack_stored(rows)), numbers.values, rtol=0, atol=1e-3)


def test_one_scale_for_a_whole_matrix(tmp_path: Path) -> None:
    form = compressed(False, 8, -1)
    form.config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"

    def write(numbers: Numbers) -> dict[str, torch.Tensor]:
        return {**form.write(numbers), "weight_scale": numbers.scale[0]}

    numbers = form.draw(np.random.default_rng(1), 9, 50)
    same = replace(numbers, scale=numbers.scale[:1].expand(9, 1).contiguous())
    read = stored(tmp_path, replace(form, write=write), same).read()
    assert np.array_equal(read.values(0, 9), same.values.numpy())


def test_groups_that_no_kernel_serves_are_refused_and_can_be_converted(tmp_path: Path) -> None:
    form = gptq("gptq", 4, 32, reordered=True)
    numbers = form.draw(np.random.default_rng(1), 8, 64)
    group = numbers.group.copy()
    group[np.flatnonzero(group == 0)[0]] = 1  # 31 and 33 columns
    uneven = replace(numbers, group=group)
    matrix = stored(tmp_path, form, uneven)
    with pytest.raises(CheckpointError, match=r"g_idx.*no multiple of 32.*--quantize none"):
        matrix.quantised_rows()
    assert np.array_equal(matrix.read().values(0, 8), uneven.values.numpy())


def test_groups_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    form = gptq("gptq", 4, 32)
    numbers = form.draw(np.random.default_rng(1), 8, 64)
    beyond = replace(form, write=lambda n: {**form.write(n), "g_idx": torch.full((64,), 2).int()})
    with pytest.raises(CheckpointError, match=r"g_idx.*outside the 2"):
        stored(tmp_path, beyond, numbers).read()


@pytest.mark.parametrize(
    ("last", "change", "says"),
    [
        ("scales", None, "'a.b.scales' is missing"),
        ("qzeros", None, "'a.b.qzeros' is missing"),
        ("scales", lambda t: t[:1], r"\(1, 8\).*asks for \(2, 8\)"),
        ("qzeros", lambda t: t.half(), "type F16"),
        ("g_idx", lambda t: t[:5], r"\(5,\).*asks for \(64,\)"),
        ("qweight", lambda t: t[0], "has matrices"),
    ],
)
def test_broken_parts_are_named(last: str, change: object, says: str, tmp_path: Path) -> None:
    form = gptq("gptq", 4, 32)

    def write(numbers: Numbers) -> dict[str, torch.Tensor]:
        tensors = form.write(numbers)
        part = tensors.pop(last)
        return {**tensors, last: change(part).contiguous()} if callable(change) else tensors

    numbers = form.draw(np.random.default_rng(1), 8, 64)
    with pytest.raises(CheckpointError, match=says) as caught:
        stored(tmp_path, replace(form, write=write), numbers)
    assert "model.safetensors" in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_reordered_file_needs_its_index(tmp_path: Path) -> None:
    form = gptq("gptq", 4, 32, reordered=True)
    numbers = form.draw(np.random.default_rng(1), 8, 64)
    without = {k: v for k, v in form.write(numbers).items() if k != "g_idx"}
    with pytest.raises(CheckpointError, match="g_idx' is missing"):
        stored(tmp_path, replace(form, write=lambda n: without), numbers)


def test_every_scheme_is_tested_and_counted(tmp_path: Path) -> None:
    names = {
        packed_scheme({"quantization_config": f.config}, tmp_path).name for f in FORMS.values()
    }
    assert names == PACKED
    assert set(BITS) >= PACKED


def test_every_scheme_is_documented_and_served() -> None:
    table = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    assert {name for name in BITS if f"`{name}`" not in table} == set()
    elsewhere = {"fp8", "fp8_block", "mxfp4"}  # those have units on other devices
    assert {"", *BITS} - elsewhere == WEIGHTS
