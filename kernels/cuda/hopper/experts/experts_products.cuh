// The products of a layer's experts, whatever their weights are stored as (`FORM`): experts_products.cu has them in bf16,
// experts_products_fp8.cu in fp8; experts.cu has what comes before and behind.
//
//   gather     gathered[place] = x[token of the pair], where pairs are many         grid T P / 8           block 256
//   gate_up    activated[place] = silu(gate) * up                                   grid: all SMs          block 320
//   down       given[pair] = w x                                                    likewise
//
//   w          E matrices of `rows` by `cols`, gate and up's rows by turns of 8, as FORM has them
//   a unit     128 rows of one expert's w by a tile of its pairs, all columns
//   few        tiles of up to 64 pairs, by wgmma of 16, 32 or 64: as many as there are; fp8: 32, and where there are more blocks than
//              multiprocessors two on each. Else a block has one to itself: it asks for more than half of the shared memory
//   many       tiles of up to 256 pairs, by 32 or a multiple; fp8: 192, by 64. Clusters of two have neighbouring rows, each fetches half the pairs
//   moves      the w of experts that somebody chose, once from memory; for each tile after the first, from L2
//
//   few, a warp         w, w, w … ──────────────────────────────────── ring: w, x ──> full
//        another        wait for the kernel before ── x, x, x … ────────^
//                       gate_up's x by all its lanes, 16 bytes of a token's row each, for the copy engine takes box after box; down's by boxes
//   many, one warp      w, w, w … ── wait ── x, x, x … in boxes, then w and x by turns
//   two warpgroups      64 rows each: wgmma k16 by k16 (the form's `multiply`) ── empty ── sums ── 16 bits, turned, in shared memory ── rows of 64 or
//                       128 bytes to memory, while the next unit is fetched
//
//   experts_tiling.cuh   a kernel at compile time, shared memory     experts_fetch.cuh     what fills the ring
//   experts_units.cuh    which units a block takes                   experts_outputs.cuh   what becomes of sums
//
// 1. Rows of w are wgmma's M and pairs its N in both: a sum has the same order whatever the tile, and all columns are one slice.
//    So a token's bits depend neither on its place nor on the pairs beside it.
// 2. Counts are found as the kernel runs (experts_plan.cuh), of bits (experts_sort.cuh) or of lists in memory: the grid is the
//    same whatever that is.
// 3. `gather` and both products let the next kernel start behind their own wait. So what lies before the kernel in front is
//    done when a product behind one of them starts: it makes its plan and fetches w before its wait, and down's w comes while
//    gate_up ends. Without a gather gate_up waits first.
// 4. Behind an expert's last pair lie the next expert's, what an earlier step left, or what the ring had: they make sums that are
//    not stored.
// 5. A thread's gate and up lie in rows 8 apart of one wgmma: nothing is exchanged for them. `stmatrix.trans` turns 8 outputs of
//    8 pairs, so that a pair's outputs lie side by side.
#pragma once

#include "dependent.cuh"
#include "epilogue.cuh"
#include "hopper/experts/experts_sort.cuh"
#include "hopper/experts/experts_fetch.cuh"
#include "hopper/experts/experts_outputs.cuh"

// A unit of up to N pairs, by two warpgroups.
template <class T, int N, class Product>
__device__ __forceinline__ void work(const Shared<T> &shared, Place<T::STAGES> &place, const Routing &routing,
                                     const PairOf &pair_of, const Product &product, const Unit &unit, unsigned blocks) {
    const unsigned thread = threadIdx.x % 128;
    unsigned known[(N + 127) / 128];
#pragma unroll
    for (int i = 0; i < (N + 127) / 128; i++) // on its way while the unit is multiplied
        known[i] = 128 * i + thread < unit.count ? product.known(routing, pair_of[unit.first + 128 * i + thread]) : 0;
    float sum[N / 2];
    T::Form::template multiply<T, N>(shared, place, blocks, sum);
    finish<T, N>(shared, routing, product, unit, sum, known);
}

// The same, multiplied with N pairs or more.
template <class T, int N, class Product>
__device__ __forceinline__ void take_unit(const Shared<T> &shared, Place<T::STAGES> &place, const Routing &routing,
                                          const PairOf &pair_of, const Product &product, const Unit &unit, unsigned blocks) {
    if (N >= T::PAIRS || unit.count <= N)
        work<T, N>(shared, place, routing, pair_of, product, unit, blocks);
    else if constexpr (N < T::PAIRS)
        take_unit<T, T::behind(N)>(shared, place, routing, pair_of, product, unit, blocks);
}

// Two warpgroups' work.
template <class T, class Product>
__device__ __forceinline__ void consume(const Shared<T> &shared, const typename T::Plan &plan, const Dealer<T> &dealer,
                                        const Routing &routing, const PairOf &pair_of, const Product &product, unsigned blocks) {
    dependent_wait();
    dependent_launch(); // behind the wait: see 3
    Place<T::STAGES> place;
    const auto take = [&](unsigned number) {
        Unit unit = plan.unit(number);
        unit.count = uniform(unit.count);
        take_unit<T, T::LEAST>(shared, place, routing, pair_of, product, unit, blocks);
    };
    if constexpr (T::DEALT) {
        while (true) {
            barrier_wait(shared.full + 8 * place.at, place.parity);
            const unsigned number = uniform(dealer.noted(place.at));
            if (number == Dealer<T>::NONE)
                return;
            take(number);
        }
    } else {
        const unsigned units = uniform(plan.units());
        for (unsigned number = blockIdx.x; number < units; number += gridDim.x)
            take(number);
    }
}

template <class T, class X, class Product>
__device__ __forceinline__ void products(const typename T::Form &w, const X &x, const Routing &routing,
                                         const Product &product) {
    extern __shared__ __align__(1024) unsigned char start[];
    __shared__ typename T::Plan plan;
    __shared__ unsigned long long slots_full[Dealer<T>::SLOTS];
    __shared__ unsigned slots[Dealer<T>::SLOTS], number_of[T::STAGES];
    const Shared<T> shared(start);
    const Dealer<T> dealer = {shared_address(number_of), shared_address(slots), shared_address(slots_full), product.tickets};
    const unsigned rows = product.rows(routing), blocks = (product.cols(routing) + T::Form::COLS - 1) / T::Form::COLS;
    if (threadIdx.x == T::MULTIPLIERS) {
        w.prefetch();
        x.prefetch();
        if (T::DEALT)
            dealer.init_barriers();
        shared.init_barriers();
    }
    const unsigned across = (rows + T::ROWS * T::SHARERS - 1) / (T::ROWS * T::SHARERS);
    PairOf pair_of = {nullptr, routing.pairs};
    if constexpr (T::SORTS) {
        __shared__ unsigned bits[Sort::WORDS];
        __shared__ unsigned short listed[Sort::PAIRS];
        Sort sort(bits, listed);
        const bool plans = threadIdx.x < T::MULTIPLIERS, sorts = Sort::takes(routing);
        if (sorts)
            pair_of.listed = listed;
        if (T::BY_TOKEN)
            dependent_wait(); // the kernel in front makes what is planned by
        if (plans) {
            const unsigned pairs = sorts ? sort.count(routing) : pairs_in_memory(routing);
            if (T::BY_TOKEN && sorts)
                count_read(routing, pairs);
            make_plan<T>(plan, pairs, routing.experts, across);
        }
        __syncthreads();
        if (sorts && plans)
            sort.list(routing, plan.begins);
        if (sorts && threadIdx.x / 32 != T::WARPS) // who fetches w needs no list
            sync_threads(4, T::MULTIPLIERS + 32);
    } else {
        if (threadIdx.x < T::MULTIPLIERS)
            make_plan<T>(plan, pairs_in_memory(routing), routing.experts, across);
        cluster_sync();
    }
    if (uniform(threadIdx.x / 32) < T::WARPS)
        consume<T>(shared, plan, dealer, routing, pair_of, product, blocks);
    else if constexpr (T::DEALT) {
        if (threadIdx.x == T::MULTIPLIERS)
            fetch_dealt<T>(shared, plan, dealer, w, x.map, rows, blocks);
    } else if (threadIdx.x < T::MULTIPLIERS + 32)
        fetch<T>(shared, plan, w, rows, blocks);
    else
        fetch<T>(shared, plan, x, routing, pair_of, blocks);
    __syncwarp();
    if (T::SHARERS > 1)
        cluster_sync(); // what blocks have sent to each other's shared memory is there
}
