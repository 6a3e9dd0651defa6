"""The packed matrices of a directory: found by their tensors, checked, and read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .grouped_matrix import GroupedMatrix
from .packed_schemes import PackedScheme, Shape
from .quantised_rows import QuantisedRows
from .safetensors_index import StoredTensor, read_array

Tables = Mapping[str, StoredTensor]

_CONVERT = "no kernel serves that, but --quantize none, int8 or int4 converts it on load"


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The weight of one module. `tensors` has its parts by their last names."""

    module: str
    scheme: PackedScheme
    shape: tuple[int, int]  # (outputs, inputs)
    tensors: Mapping[str, StoredTensor]

    @property
    def where(self) -> str:
        tensor = self.tensors[self.scheme.marker[0]]
        return f"{tensor.file}: tensor {tensor.name!r}"

    def read(self) -> GroupedMatrix:
        """Its numbers, a byte each. Raises CheckpointError."""
        arrays = {name: read_array(tensor) for name, tensor in self.tensors.items()}
        try:
            return self.scheme.matrix(arrays, *self.shape)
        except ValueError as error:
            raise self._wrong(error) from None

    def quantised_rows(self) -> QuantisedRows:
        try:
            return self.read().quantised_rows()
        except ValueError as error:
            raise self._wrong(f"{error}; {_CONVERT}") from None

    def _wrong(self, what: object) -> CheckpointError:
        index = [name for name in self.tensors if name.endswith("g_idx")]
        tensor = self.tensors[index[0]] if index else self.tensors[self.scheme.marker[0]]
        return CheckpointError(f"{tensor.file}: tensor {tensor.name!r} {what}.")


def find_packed(tables: Tables, scheme: PackedScheme) -> dict[str, PackedMatrix]:
    """Module name -> its matrix, each part checked. Modules without the scheme's tensors are left
    out: the files say what is quantised, not the configuration's list of modules."""
    last, types = scheme.marker
    found = {}
    for name, tensor in tables.items():
        if name.endswith(f".{last}") and tensor.dtype in types:
            module = name.removesuffix(f".{last}")
            found[module] = _assemble(module, tables, scheme)
    return found


def _assemble(module: str, tables: Tables, scheme: PackedScheme) -> PackedMatrix:
    marker = tables[f"{module}.{scheme.marker[0]}"]
    if len(marker.shape) != 2:
        raise CheckpointError(
            f"{marker.file}: tensor {marker.name!r} has shape {marker.shape}; {scheme.name} has "
            "matrices."
        )
    outputs, inputs = scheme.size(marker.shape, _stated(module, tables))
    tensors = {}
    for last, part in scheme.parts(outputs, inputs).items():
        name = f"{module}.{last}"
        tensor = tables.get(name)
        if tensor is None:
            if part.optional:
                continue
            raise CheckpointError(
                f"{marker.file}: tensor {name!r} is missing, which {scheme.name} needs."
            )
        if tensor.shape != part.shape or tensor.dtype not in part.types:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape} and type "
                f"{tensor.dtype}; {scheme.name} as configured asks for {part.shape} and "
                f"{' or '.join(part.types)}."
            )
        tensors[last] = tensor
    return PackedMatrix(module, scheme, (outputs, inputs), tensors)


def _stated(module: str, tables: Tables) -> Shape | None:
    tensor = tables.get(f"{module}.weight_shape")
    if tensor is None or tensor.shape != (2,) or tensor.dtype != "I64":
        return None
    return tuple(int(size) for size in read_array(tensor))
