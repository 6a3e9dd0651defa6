"""The toy model's directory on disk, and the environment in which a subprocess finds its platform.

Tests import it as `from toy_checkpoint import toy_environment, write_toy_checkpoint` (the folder
`tests/support` is on pytest's `pythonpath`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

BYTES = 256
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
END, USER, ASSISTANT, SYSTEM = range(BYTES, BYTES + len(SPECIALS))
VOCABULARY = BYTES + len(SPECIALS)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character by which byte-level BPE spells each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(BYTES) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(BYTES + i) for i, b in enumerate(others)}
    return [table[b] for b in range(BYTES)]


def write_toy_checkpoint(
    path: Path,
    script: str = "",
    max_context: int = 2048,
    sliding_window: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write config.json, tokenizer.json, tokenizer_config.json into `path` (made if absent).

    Token id = byte value, then the four specials. `script`: what it answers to every chat (after a
    prompt of n tokens without <|assistant|>: the script from its n-th byte on), then <|end|>.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "model_type": "toy",
        "architectures": ["ToyForCausalLM"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max_context,
        "eos_token_id": END,
        "assistant_token_id": ASSISTANT,
        "sliding_window": sliding_window or None,
        "script": script,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    texts = {"eos_token": SPECIALS[0], "chat_template": chat_template, "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(texts, indent=1))
    return path


def toy_environment(folder: Path) -> dict[str, str]:
    """os.environ with `folder` on PYTHONPATH, where the toy platform is "installed": its modules
    and a dist-info that declares the entry point, as pip would leave them."""
    here = Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for module in ("toy_platform.py", "toy_sampling.py"):
        shutil.copy(here / module, folder / module)
    info = folder / "sixfold_toy-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sixfold-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sixfold.platforms]\ntoy = toy_platform:ToyPlatform\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
