"""The demo model in the forms that peers read: a Hugging Face directory in float32, and GGUF files
in float32, in bfloat16 and Q8_0 (made from the same values) and as it is distributed (Q4_1).

python ci/bench/demo_model.py FOLDER    -> FOLDER/hf, FOLDER/demo-{f32,bf16,q8_0,q4_1}.gguf
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
"""What the header says of the tensors; OpenVINO GenAI goes by it."""


def write_gguf(source: Path, target: Path, kind: GGMLQuantizationType) -> None:
    """Copy every metadata field; store matrices as `kind`, vectors in float32."""
    reader = GGUFReader(source)
    field = reader.get_field("general.architecture")
    writer = GGUFWriter(target, field.contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value_kind = field.types[0]
        value = FILE_TYPES[kind] if field.name == "general.file_type" else field.contents()
        sub = field.types[-1] if value_kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, value_kind, sub_type=sub)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        data = np.ascontiguousarray(data, np.float32)
        if data.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, data)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
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
    # transformers 5 nests the base of the angles; mlx-lm reads it outside, and has another default.
    file = target / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


def main() -> None:
    from sixfold.common.checkpoint.source import resolve_model

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model("")
    for kind in FILE_TYPES:
        target = folder / f"demo-{kind.name.lower()}.gguf"
        if not target.exists():
            write_gguf(source, target, kind)
    if not (folder / "demo-q4_1.gguf").exists():
        shutil.copy(source, folder / "demo-q4_1.gguf")
    if not (folder / "hf" / "config.json").exists():
        write_hf_directory(source, folder / "hf")


if __name__ == "__main__":
    main()
