"""Guards images on their way through the engine: whatever is chunked, shared, preempted or
aborted, a request with images gives what it gives alone; other pixels never share a page, equal
ones do; an image's rows are made once and given up when its prompt is done; and what does not fit
is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from support.engine_traffic import EOS, Arrival, Heard, Wrong, run, serve
from support.engine_worlds import SHAPES, world
from support.image_mock import PAD, ImageMock, Seen, pixels, with_images
from support.mock_executor import group, mock_info

from sixfold.common import messages
from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import RequestError
from sixfold.common.images.patches import Patches
from sixfold.common.messages import AddRequest, Image
from sixfold.common.sampling import SamplingParams
from sixfold.common.scheduler import images as scheduled
from sixfold.common.scheduler.images import ImageKeys, RowImages
from sixfold.common.scheduler.scheduler import Scheduler
from sixfold.common.telemetry.load import LoadCounters
from sixfold.platforms.interface import ExecutorInfo, Status, Support
from sixfold.platforms.interface_step import StepBatch

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
CONFIG = EngineConfig(max_rows=4, max_step_tokens=4)


def plain(**changes: Any) -> ExecutorInfo:
    return with_images(mock_info([group("full", 80, 4)], **{"max_context": 120, **changes}))


def served(
    info: ExecutorInfo, arrivals: list[Arrival], config: EngineConfig = CONFIG
) -> tuple[ImageMock, list[Heard]]:
    _, executor, heard = serve(info, config, arrivals, make=ImageMock)
    return executor, heard


def spans(batches: Iterable[StepBatch]) -> list[tuple[int, int, int]]:
    return [(i.first, i.token, i.count) for batch in batches for i in batch.images]


# ---- one request


def test_an_image_in_one_step() -> None:
    seen = Seen.of([1, 2, 3], pixels(0), [4, 5])
    executor, _ = served(plain(), [seen.arrival(0, GREEDY)])
    first, *rest = executor.batches
    assert spans([first]) == [(0, 3, 4)]
    assert first.images_done == (first.images[0].key,)
    assert first.rotary is not None
    assert first.rotary.tolist()[1] == [0, 1, 2, 3, 3, 4, 4, 5, 6]
    assert [b.rotary.tolist() for b in rest] == [[[7 + i]] * 3 for i in range(4)]  # type: ignore[union-attr]
    assert not spans(rest)
    assert executor.made.total() == 1


def test_a_chunk_may_cut_an_image() -> None:
    """Eight tokens a step, an image of 24 from place 3 on; its rows are made once and kept."""
    seen = Seen.of([1, 2, 3], pixels(0, 8, 12), [4, 5])
    executor, _ = served(plain(max_step_tokens=8), [seen.arrival(0, GREEDY)])
    assert spans(executor.batches) == [(0, 3, 5), (5, 0, 8), (13, 0, 8), (21, 0, 3)]
    done = [batch.images_done for batch in executor.batches]
    assert done[:3] == [(), (), ()]
    assert done[3] == (executor.batches[0].images[0].key,)
    assert executor.made.total() == 1
    assert not executor.kept


def test_several_images_and_a_film() -> None:
    seen = Seen.of(pixels(0), [7], pixels(1, 2, 6), pixels(0), [8, 9], pixels(2, 4, 2, frames=3))
    for budget in (1, 3, 64):
        info = plain(max_step_tokens=budget, max_rows=1)
        executor, _ = served(info, [seen.arrival(0, GREEDY)])
        assert executor.made.total() == len(executor.made) == 3  # the first comes twice
        assert not executor.kept


def test_a_text_beside_it_keeps_its_own_positions() -> None:
    text = Seen.of([5, 6, 7])
    image = Seen.of([1], pixels(3))
    executor, _ = served(plain(), [text.arrival(0, GREEDY), image.arrival(0, GREEDY)])
    first = executor.batches[0]
    assert first.rotary is not None
    assert first.rotary[:, :3].tolist() == [[0, 1, 2]] * 3
    assert all(batch.rotary is not None for batch in executor.batches)


def test_steps_of_text_alone_carry_nothing_of_images() -> None:
    executor, _ = served(plain(), [Seen.of([5, 6, 7]).arrival(0, GREEDY)])
    assert all(b.images == b.images_done == () for b in executor.batches)
    assert all(b.rotary is None for b in executor.batches)


# ---- the prefix tree


def cached(heard: list[Heard]) -> list[int | None]:
    return [one.cached for one in heard]


def test_equal_images_share_pages_and_others_do_not() -> None:
    """Pages of four: text of 8, an image of 16, text of 4."""
    head, tail = [1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6]
    one, same, other = (
        Seen.of(head, pixels(seed, 8, 8), tail) for seen in "x" for seed in (1, 1, 2)
    )
    order = [one.arrival(0, GREEDY), same.arrival(30, GREEDY), other.arrival(60, GREEDY)]
    executor, heard = served(plain(), order)
    assert cached(heard) == [0, 24, 8]
    assert executor.made.total() == 2  # the second is never looked at


def test_the_same_pixels_in_another_grid_are_another_image() -> None:
    wide = pixels(1, 4, 8)
    tall = Patches(wide.values, (1, 8, 4))
    order = [Seen.of(image, [1, 2]).arrival(40 * i, GREEDY) for i, image in enumerate((wide, tall))]
    assert cached(served(plain(), order)[1]) == [0, 0]


def test_text_before_an_image_is_shared_with_plain_text() -> None:
    head = [1, 2, 3, 4, 5, 6, 7, 8]
    text, image = Seen.of([*head, 9]), Seen.of(head, pixels(1), [9])
    order = [text.arrival(0, GREEDY), image.arrival(30, GREEDY), text.arrival(60, GREEDY)]
    assert cached(served(plain(), order)[1]) == [0, 8, 8]


def test_a_spelled_placeholder_does_not_match_an_image() -> None:
    image, spelled = Seen.of(pixels(1, 8, 8), [1]), [PAD] * 16 + [1]
    info = plain()
    engine = Engine(executor := ImageMock(info), info, CONFIG, EOS)
    run(engine, [image.arrival(0, GREEDY)])
    engine.add(AddRequest(request_id="x", prompt_ids=spelled, params=GREEDY))
    batch = engine._scheduler.schedule()
    assert batch is not None
    assert batch.context_lens.tolist() == [0]
    assert len(executor.batches) == 5


def test_a_match_that_ends_inside_an_image_goes_on_from_there() -> None:
    """The second prompt finds 20 of the image's 24 tokens, the page with its end is its own."""
    image = pixels(1, 8, 12)
    order = [Seen.of(image).arrival(0, GREEDY), Seen.of(image, [3]).arrival(30, GREEDY)]
    executor, heard = served(plain(), order)
    assert cached(heard) == [0, 24]
    executor, heard = served(plain(), [order[0], replace(order[0], at=30)])
    assert cached(heard) == [0, 20]
    assert spans(executor.batches)[-1] == (20, 0, 4)
    assert executor.made.total() == 2


def test_two_rows_of_a_step_share_the_rows_of_one_image() -> None:
    image = pixels(1)
    order = [Seen.of([i], image, [i]).arrival(0, GREEDY) for i in (1, 2, 3)]
    executor, _ = served(plain(), order)
    assert executor.made.total() == 1


# ---- leaving


def test_an_aborted_request_gives_up_its_rows() -> None:
    """The next step that is built says so."""
    long = Seen.of(pixels(0, 8, 12))
    other = Seen.of([1, 2])
    order = [long.arrival(0, GREEDY, abort_at=1), other.arrival(4, GREEDY)]
    executor, _ = served(plain(max_step_tokens=8), order)
    assert not executor.kept
    assert [b.images_done for b in executor.batches if b.images_done]


def test_preemption_computes_an_image_again() -> None:
    """Room for one whole sequence and a little: rows push one another out."""
    info = with_images(mock_info([group("full", 15, 4)], max_context=60, max_rows=3))
    long = replace_tokens(GREEDY, 24)
    order = [Seen.of([i], pixels(i, 4, 8), [i]).arrival(0, long) for i in (1, 2, 3)]
    engine, executor, _ = serve(info, CONFIG, order, make=ImageMock)
    assert engine.stats().preemptions > 0
    assert not executor.kept


def replace_tokens(params: SamplingParams, most: int) -> SamplingParams:
    return msgspec.structs.replace(params, max_tokens=most)


# ---- everything at once


@pytest.mark.parametrize("seed", range(24))
def test_traffic_with_images_gives_what_each_request_gives_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 4, 16]))
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    rows = int(rng.integers(1, 5))
    slack = int(rng.choice([0, 2, 9]))
    info = world(
        size, shape, slack, 72, max_rows=rows, max_step_tokens=rows + int(rng.choice([0, 3, 20]))
    )
    info = with_images(replace(info, overlap=bool(rng.integers(2)), mixed_steps=seed % 5 > 0))
    order = [_visitor(rng, info) for _ in range(9)]
    executor, _ = served(info, order, replace(CONFIG, prefix_cache=seed % 7 > 0))
    for key, patches in executor._known.items():
        assert executor.made[key], patches


def _visitor(rng: np.random.Generator, info: ExecutorInfo) -> Arrival:
    pieces: list[Any] = []
    for _ in range(int(rng.integers(1, 4))):
        pieces.append(list(range(1, int(rng.integers(2, 9)))))
        if rng.integers(4):
            grid = 2 * rng.integers(1, 4, 2)
            pieces.append(pixels(int(rng.integers(3)), *grid.tolist()))
    seen = Seen.of(*pieces, [int(rng.integers(1, 9))])
    params = SamplingParams(
        max_tokens=int(rng.integers(1, 12)),
        temperature=float(rng.integers(2)),
        seed=int(rng.integers(2**40)),
        repetition_penalty=1.0 if rng.integers(4) else 1.3,
        prompt_logprobs=None if rng.integers(6) else 1,
        ignore_eos=bool(rng.integers(2)),
    )
    if len(seen.prompt) + 12 > info.max_context:
        seen = Seen.of([1, 2], pixels(0), [3])
    gives_up = int(rng.integers(40)) if rng.random() < 0.2 else None
    at = int(rng.integers(25))
    more = {"abort_at": None if gives_up is None else at + gives_up}
    return seen.arrival(at, params, priority=int(rng.integers(2)), **more)


# ---- the detectors


def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageKeys, "of", lambda self, digest: 0)


def _no_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scheduled.rotary_positions
    monkeypatch.setattr(scheduled, "rotary_positions", lambda *a: (right(*a)[0], 0))


def _plain_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowImages, "keys", lambda self, prompt: prompt.copy())


def _one_row_late(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowImages.within

    def late(self: Any, *place: int) -> Any:
        return (replace(i, first=max(0, i.first - 1)) for i in right(self, *place))

    monkeypatch.setattr(RowImages, "within", late)


def two_like_talks() -> list[Arrival]:
    """One after the other, the same text around unlike images."""
    talks = (Seen.of([1, 2, 3], pixels(seed, 8, 8), [9, 8, 7]) for seed in range(2))
    return [talk.arrival(40 * i, GREEDY) for i, talk in enumerate(talks)]


@pytest.mark.parametrize("fault", [_blind, _no_shift, _plain_keys, _one_row_late])
def test_a_fault_on_the_way_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(Wrong):
        served(plain(max_step_tokens=8), two_like_talks())


def test_rows_that_are_kept_too_long_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prompt comes while the first request decodes."""
    order = [replace(talk, at=4 * i) for i, talk in enumerate(two_like_talks())]
    assert served(plain(max_step_tokens=8), order)[0].most == 1
    whole = lambda self, computed: (span.key for span in self.spans)  # noqa: E731
    monkeypatch.setattr(RowImages, "ahead", whole)
    assert served(plain(max_step_tokens=8), order)[0].most == 2


def test_a_key_is_never_given_twice() -> None:
    keys = ImageKeys(remembered=2)
    names = [b"a", b"b", b"a", b"c", b"b", b"a"]  # b is forgotten at c, then a at b
    assert [keys.of(name) for name in names] == [0, 1, 0, 2, 3, 4]


# ---- crossing to the engine, and refusals


def test_images_cross_to_the_engine_process_as_they_are() -> None:
    seen = Seen.of([1], pixels(0))
    request = AddRequest(
        request_id="a", prompt_ids=seen.prompt, params=GREEDY, images=list(seen.images)
    )
    assert messages.decode_to_engine(messages.encode(request)) == request


def refusal(info: ExecutorInfo, prompt: list[int], *images: Image) -> RequestError:
    scheduler = Scheduler(info, CONFIG, EOS, LoadCounters())
    request = AddRequest(request_id="a", prompt_ids=prompt, params=GREEDY, images=list(images))
    with pytest.raises(RequestError) as caught:
        scheduler.add(request)
    assert not scheduler.open_requests
    return caught.value


def test_a_model_without_images_names_the_parameter() -> None:
    seen = Seen.of([1], pixels(0))
    error = refusal(replace(plain(), images=None), seen.prompt, *seen.images)
    assert (error.status, error.param, error.code) == (400, "images", "unsupported_parameter")
    assert "'mock'" in error.message
    why = Support(Status.NO, "the model reads text only.")
    error = refusal(replace(plain(), images=None, features={"images": why}), *seen_of(seen))
    assert "reads text only" in error.message


def seen_of(seen: Seen) -> tuple[Any, ...]:
    return (seen.prompt, *seen.images)


ONE = Seen.of([1], pixels(0), [2]).images[0]
BROKEN = {
    "odd_grid": ({"grid": (1, 3, 4)}, "multiples of 2"),
    "no_rows": ({"grid": (1, 0, 4)}, "grid"),
    "short": ({"patches": ONE.patches[:-4]}, "bytes of patches"),
    "beside": ({"start": 2}, f"needs 4 tokens {PAD}"),
    "beyond": ({"start": 4}, "beyond the prompt"),
    "before": ({"start": -1}, "beyond the prompt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_does_not_fit_its_place_is_refused(name: str) -> None:
    changes, word = BROKEN[name]
    error = refusal(plain(), [1, *[PAD] * 4, 2], msgspec.structs.replace(ONE, **changes))
    assert word in error.message
    assert error.param == "images[0]"


def test_images_in_one_place_are_refused() -> None:
    error = refusal(plain(), [1, *[PAD] * 4, 2], ONE, ONE)
    assert error.param == "images[1]"
