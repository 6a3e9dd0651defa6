"""Contract guarded: pictures to a Step-3.7-Flash over HTTP, with the official client: parts and the
whole stand in the prompt as transformers' processor places them, the tokens are transformers', and
what is no picture is a 400 that names its part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from seeing_checkpoint import data_url, file_of, picture, write_texts
from serving import Launcher, Running
from support import tiny_step3p7
from toy_checkpoint import BYTES

from sixfold.common.images.patches import Patches
from sixfold.common.images.preparation import InViews, read_preparation
from sixfold.common.images.views import WORDS

STEPS, PATCH, MERGE = 4, 14, 4
SPECIALS = ["<|im_start|>", "<|im_end|>", "<im_patch>", *WORDS]
PAD, END = BYTES + SPECIALS.index("<im_patch>"), BYTES + 1
VOCABULARY = BYTES + len(SPECIALS)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<im_patch>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VIEWS = {
    "image_processor_type": "Step3p7ImageProcessor",
    "size": {"height": 112, "width": 112},
    "patch_size": 56,
    "max_image_size": 300,
}
PICTURES = {"small": (100, 90), "wide": (90, 50), "large": (150, 120), "thin": (8, 60)}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("models") / "steps"
    model = tiny_step3p7.build(
        "published", PAD, vocab_size=VOCABULARY, eos_token_id=END, max_position_embeddings=512
    )
    tiny_step3p7.save(model, path, "published")
    write_texts(path, SPECIALS, {"eos_token": SPECIALS[1], "chat_template": TEMPLATE})
    (path / "preprocessor_config.json").write_text(json.dumps(VIEWS))
    yield path, model
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served(launcher: Launcher, seeing: tuple[Path, Any]) -> Running:
    sizes = "--max-context 256 --cache-tokens 2048 --page-size 16 --max-rows 4".split()
    return launcher.start(seeing[0], "--platform", "cpu", "--threads", "1", *sizes)


def asking(image: Image.Image | str, text: str = "What is it?") -> list[Any]:
    url = image if isinstance(image, str) else data_url(file_of(image))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def ask(served: Running, messages: Any) -> Any:
    with served.openai() as client:
        return client.chat.completions.create(
            model=served.model,
            messages=messages,
            temperature=0,
            max_tokens=STEPS,
            logprobs=True,
            logit_bias={str(PAD): -100.0},  # transformers reads no picture's token in an answer
            extra_body={"ignore_eos": True},
        )


def pixels_of(patches: Patches) -> torch.Tensor:
    _, down, across = patches.grid
    blocks = patches.values.reshape(
        down // MERGE, across // MERGE, MERGE, MERGE, 3, PATCH, PATCH
    ).transpose(4, 0, 2, 5, 1, 3, 6)
    return torch.from_numpy(blocks.reshape(3, down * PATCH, across * PATCH).copy())


def expected(seeing: tuple[Path, Any], ids: list[int], image: Image.Image) -> list[int]:
    """Greedy, by transformers, which is given parts and whole apart from each other."""
    preparation = read_preparation(seeing[0])
    assert isinstance(preparation, InViews)
    shown = [p for p in preparation.pieces(image) if isinstance(p, Patches)]
    *parts, whole = (pixels_of(patches) for patches in shown)
    given = {
        "pixel_values": whole[None],
        "pixel_values_local": torch.stack(parts) if parts else None,
        "num_local_patches": [len(parts)],
    }
    made = list(ids)
    with torch.inference_mode():
        for _ in range(STEPS):
            logits = seeing[1](input_ids=torch.tensor([made]), **given).logits
            logits[0, -1, PAD] -= 100.0
            made.append(int(logits[0, -1].argmax()))
    return made[len(ids) :]


def spelled(token: int) -> list[int]:
    return [token] if token < BYTES else list(SPECIALS[token - BYTES].encode())


def test_tokens_are_those_of_transformers_alone_and_together(
    served: Running, seeing: tuple[Path, Any]
) -> None:
    images = [picture(i, *size) for i, size in enumerate(PICTURES.values())]
    with ThreadPoolExecutor(len(images)) as pool:
        answers = list(pool.map(lambda image: ask(served, asking(image)), images))
    for image, answer in zip(images, answers, strict=True):
        ids = served.http.post("/tokenize", json={"messages": asking(image)}).json()["tokens"]
        wanted = expected(seeing, ids, image)
        entries = answer.choices[0].logprobs.content
        assert [entry.bytes for entry in entries] == [spelled(token) for token in wanted]
        assert answer.usage.prompt_tokens == len(ids)


def test_the_prompt_has_parts_then_the_whole_and_the_words_between(served: Running) -> None:
    """150 x 120 pixels are three squares of 56 by two."""
    ids = served.http.post("/tokenize", json={"messages": asking(picture(2, 150, 120))}).json()
    numbers = {word: BYTES + SPECIALS.index(word) for word in WORDS}
    part = [numbers["<patch_start>"], PAD, numbers["<patch_end>"]]
    whole = [numbers["<im_start>"], *[PAD] * 4, numbers["<im_end>"]]
    wanted = [*part * 3, numbers["<patch_newline>"], *part * 3, *whole]
    where = ids["tokens"].index(wanted[0])
    assert ids["tokens"][where : where + len(wanted)] == wanted


def test_the_next_turn_finds_its_picture_in_the_cache_and_no_other(served: Running) -> None:
    """Its own views and words are more than a page."""
    first = asking(picture(7, 200, 160))
    made = ask(served, first).choices[0].message.content
    talk = [*first, {"role": "assistant", "content": made}, {"role": "user", "content": "more"}]
    assert ask(served, talk).usage.prompt_tokens_details.cached_tokens >= 48
    other = ask(served, asking(picture(8, 200, 160)))
    assert other.usage.prompt_tokens_details.cached_tokens < 32


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (data_url(b"hello"), "invalid_image"),
        (picture(0, 201, 1), "invalid_image"),
        (picture(0, 40, 3000), "context_length_exceeded"),
        ("data:image/png;base64,%", "invalid_image_url"),
    ],
    ids=["no_picture", "strip", "many_parts", "no_base64"],
)
def test_a_picture_that_cannot_be_read_is_400(served: Running, image: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, asking(image))
    assert (caught.value.param, caught.value.code) == ("messages[0].content[0]", code)


def test_what_it_saw_matters(seeing: tuple[Path, Any]) -> None:
    one, other = picture(0, 150, 120), picture(1, 150, 120)
    ids = [BYTES, *np.arange(60, 70).tolist(), *[PAD] * 10, 65]
    assert expected(seeing, ids, one) != expected(seeing, ids, other)
