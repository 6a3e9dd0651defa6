"""Contract: Qwen3.5 with images gives transformers' log-probabilities and tokens through executor
and engine: images cut by chunks, several in a prompt, in batches with text, after a prefix hit
inside the conversation, and never another image's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from safetensors.torch import save_file
from support.run_engine import finish, serving, torch_executor
from support.tiny_qwen3_5 import NAMES, TOKENS, VOCAB, build, save, write

from sixfold.common.engine import Engine
from sixfold.common.errors import CheckpointError
from sixfold.common.images.patches import Patches, cut, tokens_of
from sixfold.common.images.settings import ImageSettings
from sixfold.common.messages import AddRequest, Image, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.cpu.native_library import missing

STEPS = 6
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
HALF = (0.5, 0.5, 0.5)
SETTINGS = ImageSettings(16, 2, 2, 32 * 32, 32 * 32 * 64, 1 / 255, HALF, HALF)
PAD = int(TOKENS["image_token_id"])
Talk = list[list[int] | Patches]


@pytest.fixture(scope="module", params=NAMES)
def model(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Path, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write(tmp_path_factory.mktemp("seeing") / request.param, request.param)
    torch.set_num_threads(threads)


def picture(seed: int, width: int, height: int) -> Patches:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cut(Pictures.fromarray(pixels), SETTINGS)


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB - 20, length).tolist()


TALKS: dict[str, Talk] = {
    "one_image": [text(9, 0), picture(0, 128, 96), text(5, 1)],
    "two_images": [picture(1, 64, 64), text(4, 2), picture(2, 32, 160), text(3, 3)],
    "text": [text(20, 4)],
    "the_other_image": [text(9, 0), picture(3, 128, 96), text(5, 1)],
    "one_image_and_more": [text(9, 0), picture(0, 128, 96), text(5, 1), text(7, 5)],
}


def request(talk: Talk, params: SamplingParams, name: str = "0") -> AddRequest:
    ids: list[int] = []
    images = []
    for piece in talk:
        if isinstance(piece, Patches):
            images.append(Image(len(ids), piece.grid, piece.values.tobytes(), piece.digest))
            ids += [PAD] * tokens_of(piece.grid, SETTINGS.merge)
        else:
            ids += piece
    return AddRequest(request_id=name, prompt_ids=ids, params=params, images=images)


def logits(oracle: Any, talk: Talk, more: list[int]) -> torch.Tensor:
    """(T, vocabulary) by transformers, the whole sequence at once."""
    ids = torch.tensor([[*request(talk, GREEDY).prompt_ids, *more]])
    images = [piece for piece in talk if isinstance(piece, Patches)]
    given = {}
    if images:
        given["pixel_values"] = torch.from_numpy(np.concatenate([i.values for i in images]))
        given["image_grid_thw"] = torch.tensor([i.grid for i in images])
    with torch.inference_mode():
        return oracle(input_ids=ids, mm_token_type_ids=(ids == PAD).int(), **given).logits[0]


def greedy(oracle: Any, talk: Talk) -> list[int]:
    made: list[int] = []
    while len(made) < STEPS:
        made.append(int(logits(oracle, talk, made)[-1].argmax()))
    return made


def answer(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def ask(engine: Engine, talk: Talk) -> tuple[list[int], int]:
    engine.add(request(talk, GREEDY))
    outputs = finish(engine)["0"]
    return answer(outputs), max(output.cached_tokens or 0 for output in outputs)


@pytest.mark.parametrize("chunk", [256, 7])
def test_log_probabilities_behind_images_are_those_of_transformers(
    model: tuple[Path, Any], chunk: int
) -> None:
    path, oracle = model
    with serving(torch_executor(path, max_rows=4, max_step_tokens=chunk)) as (engine, _):
        for name in ("one_image", "two_images"):
            want = logits(oracle, TALKS[name], []).log_softmax(-1)
            engine.add(asked := request(TALKS[name], SCORED))
            (found,) = [o.prompt_logprobs for o in finish(engine)["0"] if o.prompt_logprobs]
            for place, entry in enumerate(found[1:]):
                assert entry is not None
                assert entry.token_id == asked.prompt_ids[place + 1]
                assert abs(entry.logprob - float(want[place, entry.token_id])) < 2e-4


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_batch_of_images_and_text_gets_what_each_gets_alone(
    model: tuple[Path, Any], page_size: int
) -> None:
    path, oracle = model
    fields = {"max_rows": 4, "max_step_tokens": 10, "page_size": page_size}
    with serving(torch_executor(path, **fields)) as (engine, info):
        assert info.images is not None
        for name, talk in TALKS.items():
            engine.add(request(talk, GREEDY, name))
        found = finish(engine)
    assert {n: answer(found[n]) for n in TALKS} == {n: greedy(oracle, t) for n, t in TALKS.items()}


def test_only_the_same_image_is_gone_on_from(model: tuple[Path, Any]) -> None:
    """Pages of four: 9 tokens of text, an image of 12, 5 of text. States stand where texts branch
    and at the last boundary of each."""
    path, oracle = model
    with serving(torch_executor(path, page_size=4)) as (engine, _):
        order = ["one_image", "the_other_image", "one_image_and_more", "one_image"]
        found = {i: ask(engine, TALKS[name]) for i, name in enumerate(order)}
    assert [found[i][0] for i in found] == [greedy(oracle, TALKS[name]) for name in order]
    assert [found[i][1] for i in found] == [0, 0, 24, 24]


def test_the_images_matter(model: tuple[Path, Any]) -> None:
    _, oracle = model
    one, other = (logits(oracle, TALKS[name], [])[-1] for name in ("one_image", "the_other_image"))
    assert (one - other).abs().max() > 0.1


def rows(path: Path, **fields: Any) -> torch.Tensor:
    """What the loaded tower makes of one image."""
    executor = torch_executor(path, **fields)
    image = picture(0, 128, 96)
    with serving(executor):
        runner = executor._runner
        assert runner is not None
        with torch.inference_mode():
            return runner._model.image_rows(torch.from_numpy(image.values), [image.grid]).clone()


@pytest.mark.skipif(missing() is not None, reason="no native kernels here")
def test_rounding_the_text_leaves_the_tower_as_it_is(model: tuple[Path, Any]) -> None:
    path, _ = model
    wanted = rows(path)
    assert torch.equal(rows(path, quantize="int8"), wanted)
    for _ in range(2):  # written, then mapped at the next start
        assert torch.equal(rows(path, weight_cache=True), wanted)


def test_a_stored_sixteen_bit_tower_is_kept_and_near(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    oracle = build("dense")
    wanted = rows(save(oracle, tmp_path / "whole"))
    found = rows(save(oracle.bfloat16(), tmp_path / "half"))
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().mean() < 0.02 * wanted.std()


def test_a_checkpoint_whose_tower_is_incomplete_is_refused(tmp_path: Path) -> None:
    oracle = build("dense")
    path = save(oracle, tmp_path)
    tensors = {n: t for n, t in oracle.state_dict().items() if "visual.merger.norm" not in n}
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision\.merger\.norm\.weight"):
        torch_executor(path).load()


def test_a_tower_of_another_width_is_refused(tmp_path: Path) -> None:
    path = save(build("dense"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = 48
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="out_hidden_size"):
        torch_executor(path).load()


def test_a_text_configuration_has_no_tower(tmp_path: Path) -> None:
    """Text-only fine-tunes: the text's fields at the top, no vision_config."""
    path = save(build("dense"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    text_only = {**config["text_config"], "model_type": "qwen3_5_text"}
    (path / "config.json").write_text(json.dumps(text_only))
    with serving(torch_executor(path)) as (_, info):
        assert info.images is None
