// Drivers of the block types: kLanes consecutive blocks at a time go through the codec of blocks/*.h, on all threads.
#include "../blocks/kinds.h"
#include "lanes.h"
#include "threads.h"

namespace quantcli::QC_ISA {
namespace {

constexpr int64_t kGrain = 16;  // lane groups a thread takes at once

/// The blocks of one lane group: lanes past the end repeat the last block and are not stored. A whole group may lie past the end.
struct Group {
    int64_t block[kLanes];
    int n_lanes;

    Group(int64_t index, int64_t n_blocks) {
        n_lanes = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t wanted = index * kLanes + lane;
            n_lanes += wanted < n_blocks;
            block[lane] = wanted < n_blocks ? wanted : n_blocks - 1;
        }
    }
};

template <class Body>
void for_each_group(int64_t n_blocks, const Body& body) {
    parallel_for((n_blocks + kLanes - 1) / kLanes, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) body(Group(index, n_blocks));
    });
}

template <class Body>
auto visit(Float dtype, const Body& body) {
    switch (dtype) {
        case Float::bf16:
            return body(Bf16{});
        case Float::f16:
            return body(F16{});
        default:
            return body(float{});
    }
}

/// Runs of `n` elements of T, lane by lane, at block · n.
template <class T>
QC_FN void runs_of(T* data, const Group& group, int64_t n, T** runs) {
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = data + group.block[lane] * n;
}

template <class T, class S>
QC_CALL void load_weights(const S* W, const Group& group, F* x) {
    const S* runs[kLanes];
    runs_of(W, group, T::kBlock, runs);
    load_runs(runs, T::kBlock, x);
}

/// The importance of each lane's inputs: block b covers inputs (b mod blocks_per_row) · kBlock and on.
template <class T>
QC_CALL void load_importance(const float* importance, const Group& group, int64_t blocks_per_row, F* x) {
    const float* runs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = importance + group.block[lane] % blocks_per_row * T::kBlock;
    load_runs(runs, T::kBlock, x);
}

/// Memory for one float a row. (Not std::vector: see threads.h.)
struct RowFloats {
    float* data;
    explicit RowFloats(int64_t rows) : data(rows ? new float[rows] : nullptr) {}
    RowFloats(const RowFloats&) = delete;
    ~RowFloats() { delete[] data; }
};

/// Mean square of each row in ggml's order (one float32 sum along the row), a row a lane.
template <class S>
void row_powers(const S* W, int64_t rows, int64_t cols, float* powers) {
    for_each_group(rows, [&](const Group& group) {
        const S* runs[kLanes];
        runs_of(W, group, cols, runs);
        F sum = splat(0.0f);
        for (int64_t i = 0; i < cols; i += 32) {
            F x[32];
            load_runs(runs, 32, x);
            for (int k = 0; k < 32; ++k) sum += x[k] * x[k];
            for (int lane = 0; lane < kLanes; ++lane) runs[lane] += 32;
        }
        for (int lane = 0; lane < group.n_lanes; ++lane) powers[group.block[lane]] = sum[lane] / cols;
    });
}

// One copy of each codec, whatever the op and the float type that lead to it.

template <class T>
QC_CALL void search_lanes(const F* x, const F* importance, const F* power, Found* found) {
    T::search(x, importance, power, found);
}

template <class T>
QC_CALL void encode_lanes(const F* x, const Found& found, I* codes) {
    T::encode(x, found, codes);
}

/// The search of every lane group; done(group, x, found) takes what it found.
template <class T, class S, class Done>
void search_all(const S* W, int64_t rows, int64_t cols, const float* importance, const Done& done) {
    const bool weighted = T::kWeighted && importance;
    const int64_t blocks_per_row = cols / T::kBlock;
    const RowFloats powers(weighted && T::kRowPower ? rows : 0);
    if (powers.data) row_powers(W, rows, cols, powers.data);
    const int64_t n_blocks = rows * blocks_per_row;
    constexpr int kTaken = T::kAbreast * kLanes;
    parallel_for((n_blocks + kTaken - 1) / kTaken, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            F x[T::kAbreast * T::kBlock], wanted[T::kAbreast * T::kBlock], power[T::kAbreast];
            Found found[T::kAbreast];
            for (int b = 0; b < T::kAbreast; ++b) {
                const Group group(index * T::kAbreast + b, n_blocks);
                load_weights<T>(W, group, x + T::kBlock * b);
                if (weighted) load_importance<T>(importance, group, blocks_per_row, wanted + T::kBlock * b);
                for (int lane = 0; powers.data && lane < kLanes; ++lane) power[b][lane] = powers.data[group.block[lane] / blocks_per_row];
            }
            search_lanes<T>(x, weighted ? wanted : nullptr, power, found);
            for (int b = 0; b < T::kAbreast; ++b) done(Group(index * T::kAbreast + b, n_blocks), x + T::kBlock * b, found[b]);
        }
    });
}

/// The low kBytes of each value, little-endian. (x86 and Arm are.)
template <int kBytes>
void put_bytes(const I& values, uint8_t* const* at, int n_lanes) {
    for (int lane = 0; lane < n_lanes; ++lane) {
        const int32_t value = values[lane];
        std::memcpy(at[lane], &value, kBytes);
    }
}

template <class T>
QC_CALL void store_blocks(const I* codes, const Params& params, const Group& group, uint8_t* blocks) {
    I words[kWords<T>];
    T::pack(codes, params, words);
    uint8_t* runs[kLanes];
    runs_of(blocks, group, T::kBytes, runs);
    if constexpr (T::kHead) put_bytes<T::kHead>(outermost<T>(params), runs, group.n_lanes);
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] += T::kHead;
    store_runs(words, kWords<T>, runs, group.n_lanes);
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] += 4 * kWords<T>;
    if constexpr (T::kTail) put_bytes<T::kTail>(outermost<T>(params), runs, group.n_lanes);
}

template <int kBytes>
void get_bytes(const uint8_t* const* at, I& values) {
    for (int lane = 0; lane < kLanes; ++lane) {
        int32_t value = 0;
        std::memcpy(&value, at[lane], kBytes);
        values[lane] = value;
    }
}

template <class T>
QC_CALL void load_blocks(const uint8_t* blocks, const Group& group, I* codes, Params& params) {
    const uint8_t* runs[kLanes];
    runs_of(blocks, group, T::kBytes, runs);
    if constexpr (T::kHead) get_bytes<T::kHead>(runs, outermost<T>(params));
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] += T::kHead;
    I words[kWords<T>];
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kWords<T>; ++i) {
            int32_t word;
            std::memcpy(&word, runs[lane] + 4 * i, 4);
            words[i][lane] = word;
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] += 4 * kWords<T>;
    if constexpr (T::kTail) get_bytes<T::kTail>(runs, outermost<T>(params));
    T::unpack(words, codes, params);
}

/// Parameters to and from their arrays.
template <class T>
void put_params(const Params& params, const Group& group, const BlockParams& out) {
    constexpr int kSubs = T::kBlock / T::kSub;
    for (int lane = 0; lane < group.n_lanes; ++lane) {
        const int64_t block = group.block[lane];
        if constexpr (T::kHasD) out.d[block] = static_cast<uint16_t>(params.d[lane]);
        if constexpr (T::kHasMin) out.dmin[block] = static_cast<uint16_t>(params.dmin[lane]);
        if constexpr (T::kHasOffset) out.m[block] = static_cast<uint16_t>(params.m[lane]);
        for (int j = 0; T::kHasScales && j < kSubs; ++j) out.scale[block * kSubs + j] = static_cast<uint8_t>(params.scale[j][lane]);
        for (int j = 0; T::kHasMin && j < kSubs; ++j) out.min[block * kSubs + j] = static_cast<uint8_t>(params.min[j][lane]);
    }
}

template <class T>
void get_params(const BlockParams& in, const Group& group, Params& params) {
    constexpr int kSubs = T::kBlock / T::kSub;
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t block = group.block[lane];
        if constexpr (T::kHasD) params.d[lane] = in.d[block];
        if constexpr (T::kHasMin) params.dmin[lane] = in.dmin[block];
        if constexpr (T::kHasOffset) params.m[lane] = in.m[block];
        for (int j = 0; T::kHasScales && j < kSubs; ++j) params.scale[j][lane] = scale_from_byte<T>(in.scale[block * kSubs + j]);
        for (int j = 0; T::kHasMin && j < kSubs; ++j) params.min[j][lane] = in.min[block * kSubs + j];
    }
}

template <class T>
Status quantize_blocks(Weights W, const float* importance, uint8_t* blocks) {
    visit(W.dtype, [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(W.data);
        search_all<T>(data, W.rows, W.cols, importance, [&](const Group& group, const F* x, const Found& found) {
            I codes[T::kBlock];
            encode_lanes<T>(x, found, codes);
            store_blocks<T>(codes, found.params, group, blocks);
        });
    });
    return kOk;
}

template <class T>
Status fit_blocks(Weights W, const float* importance, BlockParams out) {
    visit(W.dtype, [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(W.data);
        search_all<T>(data, W.rows, W.cols, importance,
                      [&](const Group& group, const F*, const Found& found) { put_params<T>(found.params, group, out); });
    });
    return kOk;
}

template <class T>
Status dequantize_blocks(const uint8_t* blocks, int64_t rows, int64_t cols, float* W) {
    for_each_group(rows * (cols / T::kBlock), [&](const Group& group) {
        I codes[T::kBlock];
        F x[T::kBlock];
        Params params;
        load_blocks<T>(blocks, group, codes, params);
        T::decode(codes, params, x);
        uint8_t* runs[kLanes];
        runs_of(reinterpret_cast<uint8_t*>(W), group, 4 * T::kBlock, runs);
        store_runs(x, T::kBlock, runs, group.n_lanes);
    });
    return kOk;
}

template <class T>
Status pack_blocks(const int8_t* codes, BlockParams in, int64_t rows, int64_t cols, uint8_t* blocks) {
    for_each_group(rows * (cols / T::kBlock), [&](const Group& group) {
        I lanes[T::kBlock];
        Params params;
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < T::kBlock; ++i) lanes[i][lane] = codes[group.block[lane] * T::kBlock + i];
        get_params<T>(in, group, params);
        store_blocks<T>(lanes, params, group, blocks);
    });
    return kOk;
}

template <class T>
Status unpack_blocks(const uint8_t* blocks, int64_t rows, int64_t cols, int8_t* codes, BlockParams out) {
    for_each_group(rows * (cols / T::kBlock), [&](const Group& group) {
        I lanes[T::kBlock];
        Params params;
        load_blocks<T>(blocks, group, lanes, params);
        put_params<T>(params, group, out);
        for (int lane = 0; lane < group.n_lanes; ++lane)
            for (int i = 0; i < T::kBlock; ++i) codes[group.block[lane] * T::kBlock + i] = static_cast<int8_t>(lanes[i][lane]);
    });
    return kOk;
}

}  // namespace

extern const BlockOps block_ops;
const BlockOps block_ops = {
    .kinds = kKindInfo,
    .n_kinds = sizeof kKindInfo / sizeof *kKindInfo,
    .quantize = [](Kind kind, Weights W, const float* importance, uint8_t* blocks,
                   void*) { return with_codec(kind, [&](auto codec) { return quantize_blocks<decltype(codec)>(W, importance, blocks); }); },
    .dequantize =
        [](Kind kind, const uint8_t* blocks, int64_t rows, int64_t cols, float* W, void*) {
            return with_codec(kind, [&](auto codec) { return dequantize_blocks<decltype(codec)>(blocks, rows, cols, W); });
        },
    .fit = [](Kind kind, Weights W, const float* importance, BlockParams out,
              void*) { return with_codec(kind, [&](auto codec) { return fit_blocks<decltype(codec)>(W, importance, out); }); },
    .pack = [](Kind kind, const int8_t* codes, BlockParams in, int64_t rows, int64_t cols, uint8_t* blocks,
               void*) { return with_codec(kind, [&](auto codec) { return pack_blocks<decltype(codec)>(codes, in, rows, cols, blocks); }); },
    .unpack =
        [](Kind kind, const uint8_t* blocks, int64_t rows, int64_t cols, int8_t* codes, BlockParams out, void*) {
            return with_codec(kind, [&](auto codec) { return unpack_blocks<decltype(codec)>(blocks, rows, cols, codes, out); });
        },
};

}  // namespace quantcli::QC_ISA
