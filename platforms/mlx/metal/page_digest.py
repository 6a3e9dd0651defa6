"""`page_digest` in one launch, reading the pages where they are: a threadgroup per page. Sums
modulo 2^32 do not depend on their order, so any number of threads gives the same."""

from __future__ import annotations

import mlx.core as mx

from ....common.ops.page_digest import SEED, STRIDE
from ..page_kernels import BITS
from .launch import Launch, Launcher, MetalSource
from .mixing import MIX32

THREADS = 256

SOURCE = MetalSource(
    name="page_digest",
    inputs=("pool", "pages"),
    outputs=("words",),
    header=MIX32,
    contiguous=False,
    body="""
    threadgroup uint sums[2 * GROUPS];
    const uint page = threadgroup_position_in_grid.y;
    const size_t base = size_t(pages[page]) * size_t(pool_strides[0]);
    const uint heads = uint(pool_shape[2]);
    const uint dims = uint(pool_shape[3]);
    const uint count = uint(pool_shape[1]) * heads * dims;
    uint first = 0;
    uint second = 0;
    for (uint i = thread_position_in_threadgroup.x; i < count; i += 32 * GROUPS) {
      const size_t dim = i % dims;
      const size_t head = (i / dims) % heads;
      const size_t token = i / (dims * heads);
      const size_t place = base + token * size_t(pool_strides[1]) +
                           head * size_t(pool_strides[2]) + dim * size_t(pool_strides[3]);
      const uint k = sixfold_mix32(i * STRIDE + SEED);
      const uint a = sixfold_mix32(k ^ uint(pool[place]));
      first += a;
      second += sixfold_mix32(a + k);
    }
    first = simd_sum(first);
    second = simd_sum(second);
    if (thread_index_in_simdgroup == 0) {
      sums[simdgroup_index_in_threadgroup] = first;
      sums[GROUPS + simdgroup_index_in_threadgroup] = second;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_position_in_threadgroup.x < 2) {
      uint total = 0;
      for (uint i = 0; i < GROUPS; ++i)
        total += sums[thread_position_in_threadgroup.x * GROUPS + i];
      words[2 * page + thread_position_in_threadgroup.x] = total;
    }
    """.replace("STRIDE", f"{STRIDE}u").replace("SEED", f"{SEED}u"),
)


def page_digest(launch: Launcher, pool: mx.array, pages: mx.array) -> mx.array:
    if not len(pages):
        return mx.zeros((0, 2), mx.uint32)
    call = Launch(
        inputs=[pool.view(BITS[pool.itemsize]), pages],
        template=[("GROUPS", THREADS // 32)],
        threads=(THREADS, len(pages), 1),
        group=THREADS,
        shapes=[(len(pages), 2)],
        dtypes=[mx.uint32],
    )
    return launch(SOURCE, call)[0]
