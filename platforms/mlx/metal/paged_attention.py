"""`paged_attention` in one launch, keys and values read where they are: a threadgroup per row and
query head, whose simdgroups take turns at the keys, each with a running softmax (Milakov and
Gimelshein 2018); at the end the parts are brought to one maximum and added."""

from __future__ import annotations

import mlx.core as mx

from .launch import Launch, Launcher, MetalSource

THREADS = 256

# The first maximum is a finite number below every logit: exp(START - x) is 0 and nothing is
# computed with infinities.
SOURCE = MetalSource(
    name="paged_attention",
    inputs=tuple("q keys values pages lengths sinks group_size slots columns scale window".split()),
    outputs=("out",),
    body="""
    constexpr int KEY_PARTS = (KEY_DIM + 31) / 32;
    constexpr int VALUE_PARTS = (VALUE_DIM + 31) / 32;
    constexpr float START = -1e30f;
    threadgroup float maxima[GROUPS];
    threadgroup float totals[GROUPS];
    threadgroup float parts[GROUPS * VALUE_DIM];
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int head = int(threadgroup_position_in_grid.y);
    const int row = int(threadgroup_position_in_grid.z);
    const size_t query = size_t(row) * threadgroups_per_grid.y + head;
    const size_t base = size_t(head / group_size) * size_t(slots);
    const int length = int(lengths[row]);
    const int first = window > 0 && length > window ? length - window : 0;

    float asked[KEY_PARTS];
    for (int part = 0; part < KEY_PARTS; ++part) {
      const int d = lane + 32 * part;
      asked[part] = d < KEY_DIM ? float(q[query * KEY_DIM + d]) * scale : 0.0f;
    }
    float found[VALUE_PARTS];
    for (int part = 0; part < VALUE_PARTS; ++part) found[part] = 0.0f;
    const bool has_sink = SINKS && group == 0 && length > 0;
    float highest = has_sink ? float(sinks[head]) : START;
    float total = has_sink ? 1.0f : 0.0f;

    for (int key = first + group; key < length; key += GROUPS) {
      const size_t page = size_t(pages[size_t(row) * size_t(columns) + key / PAGE_SIZE]);
      const size_t slot = base + page * PAGE_SIZE + key % PAGE_SIZE;
      float logit = 0.0f;
      for (int part = 0; part < KEY_PARTS; ++part) {
        const int d = lane + 32 * part;
        if (d < KEY_DIM) logit += asked[part] * float(keys[slot * KEY_DIM + d]);
      }
      logit = simd_sum(logit);
      const float higher = metal::max(highest, logit);
      const float kept = metal::precise::exp(highest - higher);
      const float weight = metal::precise::exp(logit - higher);
      highest = higher;
      total = total * kept + weight;
      for (int part = 0; part < VALUE_PARTS; ++part) {
        const int d = lane + 32 * part;
        if (d < VALUE_DIM)
          found[part] = found[part] * kept + weight * float(values[slot * VALUE_DIM + d]);
      }
    }

    if (lane == 0) {
      maxima[group] = highest;
      totals[group] = total;
    }
    for (int part = 0; part < VALUE_PARTS; ++part) {
      const int d = lane + 32 * part;
      if (d < VALUE_DIM) parts[group * VALUE_DIM + d] = found[part];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float over_all = START;
    for (int g = 0; g < GROUPS; ++g) over_all = metal::max(over_all, maxima[g]);
    float whole = 0.0f;
    for (int g = 0; g < GROUPS; ++g)
      whole += totals[g] * metal::precise::exp(maxima[g] - over_all);
    for (int d = int(thread_position_in_threadgroup.x); d < VALUE_DIM; d += 32 * GROUPS) {
      float sum = 0.0f;
      for (int g = 0; g < GROUPS; ++g)
        sum += parts[g * VALUE_DIM + d] * metal::precise::exp(maxima[g] - over_all);
      out[query * VALUE_DIM + d] = T(length > 0 ? sum / whole : 0.0f);
    }
    """,
)


def paged_attention(
    launch: Launcher,
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    pages: mx.array,
    lengths: mx.array,
    kv_heads: int,
    page_size: int,
    scale: float,
    window: int = 0,
    sinks: mx.array | None = None,
) -> mx.array:
    rows, heads, key_dim = q.shape
    value_dim = values.shape[1]
    if not rows:
        return mx.zeros((0, heads, value_dim), q.dtype)
    counts = (heads // kv_heads, keys.shape[0] // kv_heads, pages.shape[1])
    call = Launch(
        inputs=[
            q,
            keys,
            values,
            pages,
            lengths,
            mx.zeros((1,), mx.float32) if sinks is None else sinks.astype(mx.float32),
            *(mx.array(n, mx.int32) for n in counts),
            mx.array(scale, mx.float32),
            mx.array(window, mx.int32),
        ],
        template=[
            ("T", q.dtype),
            ("KEY_DIM", key_dim),
            ("VALUE_DIM", value_dim),
            ("PAGE_SIZE", page_size),
            ("GROUPS", THREADS // 32),
            ("SINKS", sinks is not None),
        ],
        threads=(THREADS, heads, rows),
        group=THREADS,
        shapes=[(rows, heads, value_dim)],
        dtypes=[q.dtype],
    )
    return launch(SOURCE, call)[0]
