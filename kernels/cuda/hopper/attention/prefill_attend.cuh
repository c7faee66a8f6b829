// A warpgroup of attention_prefill that attends: part after part, leaf after leaf, span after span.
#pragma once
#include "hopper/attention/prefill_leaf.cuh"
#include "hopper/transpose.cuh"
#include "place.cuh"
#include "words.cuh"

// A part's queries become f16 numbers where they lie.
template <int HD, bool FP8> __device__ __forceinline__ void narrow_queries(const Shared<HD, FP8> &shared, unsigned part) {
    for (unsigned i = threadIdx.x % 128 * 16; i < Shared<HD, FP8>::QUERY_BYTES; i += 128 * 16) {
        const uint4 words = load_words(shared.queries(part) + i);
        store_words(shared.queries(part) + i, {halves_of(words.x), halves_of(words.y), halves_of(words.z), halves_of(words.w)});
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync_threads(1 + part, 128);
}

// One warpgroup's way through its parts.
template <int HD, bool FP8> struct Attender {
    using S = Shared<HD, FP8>;
    const Shared<HD, FP8> shared;
    const unsigned group, lane, window; // which of the warpgroups
    Place<S::STAGES> place;
    Part part;
    unsigned token[2], query[2]; // of the thread's rows: tokens of the part, and queries of the step counted from its first
    unsigned limit[2];           // positions that they attend to

    __device__ __forceinline__ Attender(const PrefillArgs &args, const Shared<HD, FP8> &shared)
        : shared(shared), group(threadIdx.x / 128), lane(threadIdx.x % 32), window(args.window) {
        const unsigned row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            token[i] = (row + 8 * i) / args.group;
            query[i] = token[i] * args.kv_heads * args.group + (row + 8 * i) % args.group;
        }
    }

    // Waits for the next part; says whether there is one.
    __device__ __forceinline__ bool take(unsigned parity) {
        barrier_wait(shared.answered(group), parity);
        part = load_part(shared.part(group));
        if (FP8 && part.count > 0)
            narrow_queries(shared, group);
        limit[0] = part.position + token[0] + 1;
        limit[1] = part.position + token[1] + 1;
        return part.kv_end > 0;
    }

    // Says whether the state is that of all that the part sees.
    __device__ __forceinline__ bool attend(const PrefillArgs &args, PrefillState<HD> &state) {
        const unsigned stop = part.stop();
        bool keeps = false;
        unsigned begin = part.kv_begin / LEAF * LEAF;
        for (; begin < stop && begin + LEAF + window <= part.position + 1; begin += LEAF)
            skip();
        const bool sees = begin < stop;
        if (!sees)
            barrier_arrive(shared.asked(group));
        for (; begin < stop; begin += LEAF) {
            if (begin % SPAN == 0 && begin > part.kv_begin) {
                keep_span(args, state, keeps);
                keeps = true;
            }
            const unsigned rest = stop - begin;
            if (rest > 96)
                attend_leaf<8>(state, begin);
            else if (rest > 64)
                attend_leaf<6>(state, begin);
            else if (rest > 32)
                attend_leaf<4>(state, begin);
            else
                attend_leaf<2>(state, begin);
        }
        for (; begin < part.kv_end; begin += LEAF)
            skip();
        if (keeps)
            state.template fold_kept<true>(kept(args, part.place));
        return part.span == ALL || (sees && merge(args, state));
    }

    // Where the thread's state is kept.
    __device__ __forceinline__ float4 *kept(const PrefillArgs &args, unsigned place) const {
        return args.kept + ((size_t)place * PARTS + group) * ((HD / 8 + 1) * 128) + threadIdx.x % 128;
    }

    // Folds a span's state into what is kept, if something is; the next span starts from nothing.
    __device__ __forceinline__ void keep_span(const PrefillArgs &args, PrefillState<HD> &state, bool keeps) const {
        float4 *at = kept(args, part.place);
        if (keeps)
            state.template fold_kept<true>(at);
        state.keep(at);
        state = PrefillState<HD>();
    }

    // Keeps the state of one of the spans that the part sees. Who is the last folds all.
    __device__ __forceinline__ bool merge(const PrefillArgs &args, PrefillState<HD> &state) const {
        const unsigned first = first_seen(part.position, window) / SPAN, last = (part.end() - 1) / SPAN;
        const unsigned place = part.place - (part.span - first) * args.kv_heads; // of the first
        unsigned *arrived = args.arrived + (place * PARTS + group) * 4 + threadIdx.x % 128 / 32, before = 0;
        state.keep(kept(args, part.place));
        __syncwarp();
        if (lane == 0)
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
        before = __shfl_sync(FULL_WARP, before, 0);
        __syncwarp(); // what lane 0 acquired the others may read
        if (before < last - first)
            return false;
        if (lane == 0)
            *arrived = 0;
        state = PrefillState<HD>();
#pragma unroll 1
        for (unsigned span = first; span <= last; span++)
            state.template fold_kept<false>(kept(args, place + (span - first) * args.kv_heads));
        return true;
    }

    // Attends to the first tiles of the leaf at `begin` and folds the result.
    template <int TILES> __device__ __forceinline__ void attend_leaf(PrefillState<HD> &state, unsigned begin) {
        float s[TILES * 8], m[2];
        barrier_wait(shared.full(place.at), place.parity);
        score_part<HD, FP8, TILES>(s, shared.queries(group), shared.stage(place.at));
        if constexpr (FP8)
            scale_scores<TILES>(s, shared.scales(place.at));
        pass();
        if (begin + LEAF >= part.stop())
            barrier_arrive(shared.asked(group));
        if (begin + LEAF > part.position + 1)
            mask_behind(s, limit, begin, lane);
        if (begin + window < part.end())
            mask_before(s, limit, window, begin, lane);
        row_maxima(m, s);
        exponentials<HD>(s, m);
        unsigned p[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++)
            p[i / 4][i % 4] = rounded_pair<FP8>(s[2 * i], s[2 * i + 1]);
        barrier_wait(shared.full(place.at), place.parity);
        const unsigned values = shared.stage(place.at), scales = shared.scales(place.at);
        if (begin + TILES * TILE > part.kv_end)
            zero_rows<HD, FP8>(values, scales, part.kv_end - begin, TILES * TILE, group);
        if (begin < part.kv_begin)
            zero_rows<HD, FP8>(values, scales, 0, part.kv_begin - begin, group);
        if constexpr (FP8)
            fold_codes(state, p, m, values, scales, shared.ones());
        else
            fold(state, p, m, values, shared.ones());
        pass();
    }

    // Is done with a leaf that its queries don't see.
    __device__ __forceinline__ void skip() {
        for (int i = 0; i < 2; i++) {
            barrier_wait(shared.full(place.at), place.parity);
            pass();
        }
    }

    // Is done with the stage.
    __device__ __forceinline__ void pass() {
        barrier_arrive(shared.empty(place.at));
        place.advance();
    }

    // Stores the rows: lanes of four exchange words, so that each has 8 dims beside each other.
    __device__ __forceinline__ void store(const PrefillArgs &args, const PrefillState<HD> &state) const {
        const size_t first = ((size_t)part.token * args.kv_heads + part.head) * args.group;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float inverse = __frcp_rn(state.l[i]);
            bf16 *out = args.out + (first + query[i]) * HD + lane % 4 * 8;
#pragma unroll
            for (int n = 0; n < HD / 32; n++) {
                unsigned words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *o = state.o + (4 * n + j) * 4 + 2 * i;
                    words[j] = rounded_pair<false>(__fmul_rn(o[0], inverse), __fmul_rn(o[1], inverse));
                }
                transpose(words, lane);
                if (token[i] < part.count)
                    *reinterpret_cast<uint4 *>(out + n * 32) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
};

// A warpgroup attends, part after part, until there is none.
template <int HD, bool FP8> __device__ __forceinline__ void attend(const PrefillArgs &args, const Shared<HD, FP8> &shared) {
    Attender<HD, FP8> attender(args, shared);
    for (unsigned parity = 0; attender.take(parity); parity ^= 1) {
        PrefillState<HD> state;
        if (attender.attend(args, state))
            attender.store(args, state);
    }
}
