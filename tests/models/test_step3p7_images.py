"""Contract: Step-3.7-Flash with views of images gives transformers' log-probabilities and tokens
from the published names, through executor and engine: views cut by chunks, several in a prompt, of
sizes that the learned positions are resampled for, in batches, and never another view's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.run_engine import finish, one_thread, serving, torch_executor
from support.tiny_step3p7 import build, save

from sixfold.common.errors import CheckpointError
from sixfold.common.messages import AddRequest, Image
from sixfold.common.sampling import SamplingParams

PAD, PATCH, MERGE = 250, 14, 4
WHOLE, PART = 112, 56  # pixels to a side: of a whole picture, and of its parts
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
Talk = list[list[int] | torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Iterator[tuple[Path, Any]]:
    with one_thread():
        oracle = build("published")
        yield save(oracle, tmp_path_factory.mktemp("seeing"), "published"), oracle


def view(seed: int, side: int) -> torch.Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, PAD, length).tolist()


TALKS: dict[str, Talk] = {
    "one": [text(6, 0), view(0, WHOLE), text(5, 1)],
    "parts": [text(4, 2), view(1, PART), [9], view(2, PART), [8], view(3, WHOLE), text(9, 3)],
    "two": [view(4, WHOLE), text(3, 4), view(5, PART), [7], view(6, WHOLE), text(2, 5)],
    "other": [text(6, 0), view(7, WHOLE), text(5, 1)],
    "text": [text(30, 6)],
}
PARTS = {"one": [0], "parts": [2], "two": [0, 1], "other": [0], "text": []}


def patches(picture: torch.Tensor) -> np.ndarray:
    """Block by block of MERGE x MERGE patches."""
    blocks = picture.shape[1] // PATCH // MERGE
    split = picture.view(3, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    return split.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * PATCH**2).numpy()


def request(talk: Talk, params: SamplingParams, name: str = "0") -> AddRequest:
    ids: list[int] = []
    images = []
    for piece in talk:
        if isinstance(piece, list):
            ids += piece
            continue
        values, side = patches(piece), piece.shape[1] // PATCH
        digest = values.tobytes()[:64]
        images.append(Image(len(ids), (1, side, side), values.tobytes(), digest))
        ids += [PAD] * (side // MERGE) ** 2
    return AddRequest(request_id=name, prompt_ids=ids, params=params, images=images)


def logits(oracle: Any, name: str, more: list[int]) -> torch.Tensor:
    views = [piece for piece in TALKS[name] if isinstance(piece, torch.Tensor)]
    given: dict[str, Any] = {}
    if views:
        small = [v for v in views if v.shape[1] == PART]
        given["pixel_values"] = torch.stack([v for v in views if v.shape[1] == WHOLE])
        given["pixel_values_local"] = torch.stack(small) if small else None
        given["num_local_patches"] = PARTS[name]
    ids = torch.tensor([[*request(TALKS[name], GREEDY).prompt_ids, *more]])
    with torch.inference_mode():
        return oracle(input_ids=ids, **given).logits[0]


def greedy(oracle: Any, name: str) -> list[int]:
    made: list[int] = []
    while len(made) < 5:
        made.append(int(logits(oracle, name, made)[-1].argmax()))
    return made


@pytest.mark.parametrize("chunk", [256, 3])
def test_log_probabilities_are_those_of_transformers(model: tuple[Path, Any], chunk: int) -> None:
    path, oracle = model
    with serving(torch_executor(path, max_rows=3, max_step_tokens=chunk)) as (engine, _):
        for name in ("one", "parts", "two"):
            want = logits(oracle, name, []).log_softmax(-1)
            engine.add(asked := request(TALKS[name], SCORED))
            (found,) = [o.prompt_logprobs for o in finish(engine)["0"] if o.prompt_logprobs]
            for place, entry in enumerate(found[1:]):
                assert entry is not None
                assert entry.token_id == asked.prompt_ids[place + 1]
                assert abs(entry.logprob - float(want[place, entry.token_id])) < 2e-4


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_batch_gets_what_each_gets_alone(model: tuple[Path, Any], page_size: int) -> None:
    path, oracle = model
    fields = {"max_rows": 3, "max_step_tokens": 10, "page_size": page_size}
    with serving(torch_executor(path, **fields)) as (engine, _):
        for name, talk in TALKS.items():
            engine.add(request(talk, GREEDY, name))
        found = finish(engine)
    tokens = {n: [t for o in found[n] for t in o.token_ids] for n in TALKS}
    assert tokens == {name: greedy(oracle, name) for name in TALKS}


def test_the_views_matter(model: tuple[Path, Any]) -> None:
    one, other = (logits(model[1], name, [])[-1] for name in ("one", "other"))
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("changes", [{"layer_norm_eps": 1e-6}, {"hidden_act": "gelu"}])
def test_another_tower_is_refused(
    model: tuple[Path, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    path = shutil.copytree(model[0], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        torch_executor(path).load()
