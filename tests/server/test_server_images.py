"""Contract guarded: image parts of chat requests, with the official client against a served model
that sees: the tokens are transformers', images count as tokens, equal ones come from the cache, and
every image that cannot be read is a 400 that names its part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from seeing_checkpoint import PAD, data_url, file_of, picture, write_seeing
from serving import Launcher, Running

from sixfold import LLM, SamplingParams
from sixfold.common.errors import RequestError
from sixfold.common.images.patches import Patches, cut, open_picture
from sixfold.common.images.settings import read_image_settings
from sixfold.server.images import NoImages
from sixfold.server.llm_images import take_images

STEPS = 5


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("models") / "seeing"
    yield path, write_seeing(path)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served(launcher: Launcher, seeing: tuple[Path, Any]) -> Running:
    sizes = "--max-context 512 --cache-tokens 4096 --page-size 16 --max-rows 4".split()
    return launcher.start(seeing[0], "--platform", "cpu", "--threads", "1", *sizes)


def part(image: Image.Image | str, **more: Any) -> dict[str, Any]:
    url = image if isinstance(image, str) else data_url(file_of(image))
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def ask(served: Running, messages: Any, **more: Any) -> Any:
    return served.openai().chat.completions.create(
        model=served.model,
        messages=messages,
        temperature=0,
        max_tokens=STEPS,
        logprobs=True,
        extra_body={"ignore_eos": True},
        **more,
    )


def tokens_of(served: Running, messages: Any) -> list[int]:
    answer = served.http.post("/tokenize", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]


def expected(seeing: tuple[Path, Any], ids: list[int], images: list[Image.Image]) -> list[int]:
    """Greedy, by transformers, from our tokens and patches."""
    path, model = seeing
    settings = read_image_settings(path)
    patches: list[Patches] = [cut(open_picture(file_of(i)), settings) for i in images]
    values = torch.from_numpy(np.concatenate([p.values for p in patches]))
    grids = torch.tensor([p.grid for p in patches])
    made = list(ids)
    with torch.inference_mode():
        for _ in range(STEPS):
            known = torch.tensor([made])
            logits = model(
                input_ids=known,
                mm_token_type_ids=(known == PAD).int(),
                pixel_values=values,
                image_grid_thw=grids,
            ).logits
            made.append(int(logits[0, -1].argmax()))
    return made[len(ids) :]


def spelled(answer: Any) -> list[list[int]]:
    return [entry.bytes for entry in answer.choices[0].logprobs.content]


def test_tokens_are_those_of_transformers(served: Running, seeing: tuple[Path, Any]) -> None:
    for number, sizes in enumerate([[(100, 70)], [(64, 64), (40, 160)]]):
        images = [picture(10 * number + i, *size) for i, size in enumerate(sizes)]
        messages = user("What", *map(part, images), "is this?")
        ids = tokens_of(served, messages)
        wanted = expected(seeing, ids, images)
        assert max(wanted) < 256  # bytes, which can be told from the answer
        answer = ask(served, messages)
        assert spelled(answer) == [[token] for token in wanted]
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.total_tokens == len(ids) + STEPS


def test_an_image_takes_a_token_per_block_of_pixels(served: Running) -> None:
    """100 x 70 pixels become 96 x 64: three blocks of 32 by two."""
    ids = tokens_of(served, user(part(picture(0, 100, 70)), "x"))
    assert ids.count(PAD) == 6
    text = tokens_of(served, user("x"))
    assert len(ids) == len(text) + 6 + 2


def test_streams_and_several_choices(served: Running, seeing: tuple[Path, Any]) -> None:
    image = picture(5, 64, 96)
    messages = user(part(image), "tell")
    whole = ask(served, messages)
    chunks = list(ask(served, messages, stream=True, n=2))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts[0] == texts[1] == whole.choices[0].message.content


def test_the_next_turn_finds_its_image_in_the_cache_and_no_other(served: Running) -> None:
    """The image is of 40 tokens, so pages lie wholly within it."""
    first = user("before", part(picture(6, 256, 160)), "what?")
    made = ask(served, first).choices[0].message.content
    talk = [*first, {"role": "assistant", "content": made}, {"role": "user", "content": "more"}]
    again = ask(served, talk).usage.prompt_tokens_details.cached_tokens
    assert again >= 48
    other = user("before", part(picture(7, 256, 160)), "what?")
    assert ask(served, other).usage.prompt_tokens_details.cached_tokens < 32


FILE = file_of(picture(0, 64, 64))
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "corrupt": (part(data_url(FILE[:200])), "invalid_image", "cannot be decoded"),
    "empty": (part(data_url(b"")), "invalid_image", "empty"),
    "no_picture": (part(data_url(b"hello")), "invalid_image", "PNG"),
    "bmp": (part(data_url(file_of(picture(0, 9, 9), "BMP"))), "invalid_image", "formats"),
    "strip": (part(picture(0, 201, 1)), "invalid_image", "200 times"),
    "too_many_tokens": (part(picture(0, 1280, 480)), "context_length_exceeded", "600 tokens"),
    "not_base64": (part("data:image/png;base64,%%%"), "invalid_image_url", "base64"),
    "not_encoded": (part("data:image/png,abc"), "invalid_image_url", "base64"),
    "http": (part("http://127.0.0.1/x.png"), "image_url_not_allowed", "--fetch-images"),
    "https": (part("https://example.com/x.png"), "image_url_not_allowed", "--fetch-images"),
    "file": (part("file:///etc/passwd"), "invalid_image_url", "data:"),
    "no_scheme": (part("x.png"), "invalid_image_url", "data:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_cannot_be_read_is_400_and_its_part_is_named(
    served: Running, name: str
) -> None:
    bad, code, word = REFUSED[name]
    good = part(data_url(FILE))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, user("see", good, bad))
    assert (caught.value.param, caught.value.code) == ("messages[0].content[2]", code)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (part(data_url(FILE), detail="low"), "messages[0].content[0].image_url.detail"),
        (part(data_url(FILE), size=3), "messages[0].content[0].image_url.size"),
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": {}}, "messages[0].content[0].image_url.url"),
        ({"type": "input_audio", "input_audio": {}}, "messages[0].content[0].type"),
        ({"type": "text", "txt": "x"}, "messages[0].content[0].txt"),
        ({"text": "x"}, "messages[0].content[0].type"),
    ],
    ids=["low_detail", "unknown", "no_url_object", "no_url", "audio", "text_misspelled", "no_type"],
)
def test_a_malformed_part_is_named(served: Running, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, [{"role": "user", "content": [wrong]}])
    assert caught.value.param == param, str(caught.value)


def test_detail_that_asks_for_the_whole_image_is_served(served: Running) -> None:
    for detail in ("auto", "high"):
        assert ask(served, user(part(data_url(FILE), detail=detail), "x")).usage.prompt_tokens


@pytest.mark.parametrize(
    "message", [user("<|image_pad|>"), user(part(data_url(FILE)), "<|image_pad|>")]
)
def test_a_text_must_not_spell_the_placeholder(served: Running, message: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, message)
    assert (caught.value.param, caught.value.code) == ("messages", "image_placeholders")


# ---- offline


@pytest.fixture(scope="module")
def llm(seeing: tuple[Path, Any]) -> Iterator[LLM]:
    sizes = {"max_context": 512, "cache_tokens": 2048, "page_size": 16, "max_rows": 4}
    with LLM(str(seeing[0]), platform="cpu", threads=1, **sizes) as llm:
        yield llm


def test_offline_answers_are_those_over_http(llm: LLM, served: Running, tmp_path: Path) -> None:
    data = file_of(picture(8, 96, 64))
    (tmp_path / "x.png").write_bytes(data)
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    http = ask(served, user("look", part(data_url(data)))).choices[0].message.content
    forms = [
        {"type": "image", "image": data},
        {"type": "image", "image": tmp_path / "x.png"},
        part(data_url(data)),
    ]
    talks = [user("look", form) for form in forms]
    answers = llm.chat(talks, params, progress=False)
    assert [answer.text for answer in answers] == [http] * 3
    assert llm.chat_prompt(talks[0]) == tokens_of(served, user("look", part(data_url(data))))


@pytest.mark.parametrize(
    ("image", "word"),
    [("nowhere.png", "cannot be read"), (7, "path or bytes"), (b"x", "formats"), (None, "path")],
    ids=["missing", "number", "no_picture", "none"],
)
def test_an_image_that_cannot_be_read_offline_is_named(llm: LLM, image: Any, word: str) -> None:
    with pytest.raises(RequestError, match=word) as caught:
        llm.chat(user("look", {"type": "image", "image": image}), progress=False)
    assert caught.value.param == "messages[0].content[1]"


def test_a_text_model_offline_takes_no_image() -> None:
    talk = user({"type": "image", "image": b""})
    with pytest.raises(RequestError, match=r"content\[0\] is an image.*because"):
        take_images(talk, NoImages("because"))
    plain = [{"role": "user", "content": "x"}]
    assert take_images(plain, NoImages("because")) == (plain, [])
