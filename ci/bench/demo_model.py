"""The demo model in the forms that peers read: a Hugging Face directory and a GGUF, both float32.

python ci/bench/demo_model.py FOLDER    -> FOLDER/hf, FOLDER/demo-f32.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter


def write_f32_gguf(source: Path, target: Path) -> None:
    """Copy every metadata field; store every tensor dequantised."""
    reader = GGUFReader(source)
    field = reader.get_field("general.architecture")
    writer = GGUFWriter(target, field.contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        value = 0 if field.name == "general.file_type" else field.contents()
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hf_directory(source: Path, target: Path) -> None:
    """Through transformers' own GGUF reader, so that the peer runs nothing of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 now
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


def main() -> None:
    from sixfold.common.checkpoint.source import resolve_model

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model("")
    if not (folder / "demo-f32.gguf").exists():
        write_f32_gguf(source, folder / "demo-f32.gguf")
    if not (folder / "hf" / "config.json").exists():
        write_hf_directory(source, folder / "hf")


if __name__ == "__main__":
    main()
