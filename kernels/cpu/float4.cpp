// Drivers of the 4-bit blocks: a lane is a block, taken a tile at a time; the short block at the end of a tensor goes weight by weight.
#include "../blocks/float4.h"

#include "lanes.h"
#include "threads.h"

namespace quantcli::QC_ISA {
namespace {

constexpr int kTile = 32;  // weights of each lane in registers and the first cache at once: the smallest block, and all are multiples
constexpr int kTileWords = kTile / kCodesPerWord;
constexpr int64_t kWeightsAtOnce = 1 << 15;  // what a thread takes

/// kLanes whole blocks; lanes past the last one repeat it and are not stored.
struct Lanes {
    int64_t block[kLanes];
    int n_lanes;

    Lanes(int64_t index, int64_t n_blocks) {
        const int64_t first = index * kLanes, left = n_blocks - first;
        n_lanes = left < kLanes ? static_cast<int>(left) : kLanes;
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = first + (lane < n_lanes ? lane : n_lanes - 1);
    }
};

/// body(Lanes) for all whole blocks, on all threads.
template <class Body>
void for_whole_blocks(const Float4& shape, const Body& body) {
    const int64_t n_blocks = shape.n / shape.block, grain = kWeightsAtOnce / (kLanes * shape.block);
    parallel_for((n_blocks + kLanes - 1) / kLanes, grain > 1 ? grain : 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) body(Lanes(index, n_blocks));
    });
}

/// x = the weights of each lane's block from `start` on.
template <class S>
QC_FN void load_tile(const S* W, const Float4& shape, const Lanes& lanes, int64_t start, F* x) {
    const S* runs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = W + lanes.block[lane] * shape.block + start;
    load_runs(runs, kTile, x);
}

QC_FN void load_words(const uint8_t* packed, const Float4& shape, const Lanes& lanes, int64_t start, I* words) {
    for (int lane = 0; lane < kLanes; ++lane) {
        int32_t run[kTileWords];
        std::memcpy(run, packed + (lanes.block[lane] * shape.block + start) / 2, sizeof run);
        for (int i = 0; i < kTileWords; ++i) words[i][lane] = run[i];
    }
}

QC_FN void store_words(const I* words, const Float4& shape, const Lanes& lanes, int64_t start, uint8_t* packed) {
    for (int lane = 0; lane < lanes.n_lanes; ++lane) {
        int32_t run[kTileWords];
        for (int i = 0; i < kTileWords; ++i) run[i] = words[i][lane];
        std::memcpy(packed + (lanes.block[lane] * shape.block + start) / 2, run, sizeof run);
    }
}

QC_FN F load_each(const float* values, const Lanes& lanes) {
    F x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = values[lanes.block[lane]];
    return x;
}

QC_FN void store_each(F x, const Lanes& lanes, float* values) {
    for (int lane = 0; lane < lanes.n_lanes; ++lane) values[lanes.block[lane]] = x[lane];
}

/// Weight i of W.
template <class S>
float weight(const S* W, int64_t i) {
    S padded[kLanes] = {W[i]};
    return load(padded)[0];
}

int32_t code_at(const uint8_t* packed, int64_t i) { return packed[i / 2] >> (i % 2 ? 0 : 4) & 15; }

/// The short block's own rule, which is bitsandbytes': its scale is never below 1e-38, and weights are divided by it.
template <bool kSorted, class S>
void quantize_rest(const Float4& shape, const S* W, uint8_t* packed, float* scale) {
    const int64_t n_whole = shape.n / shape.block, start = n_whole * shape.block;
    if (start == shape.n) return;
    F peak = splat(1e-38f);
    for (int64_t i = start; i < shape.n; ++i) peak = max(peak, absolute(splat(weight(W, i))));
    scale[n_whole] = peak[0];
    for (int64_t i = start; i < shape.n; i += 2) {
        const float second = i + 1 < shape.n ? weight(W, i + 1) : 0.0f;
        const I high = nearest_level<kSorted>(splat(weight(W, i)) / peak, shape.book);
        const I low = nearest_level<kSorted>(splat(second) / peak, shape.book);
        packed[i / 2] = static_cast<uint8_t>(high[0] << 4 | low[0]);
    }
}

template <bool kSorted, class S>
void quantize_all(const Float4& shape, const S* W, uint8_t* packed, float* scale) {
    for_whole_blocks(shape, [&](const Lanes& lanes) {
        F x[kTile];
        F peak = splat(0.0f);
        for (int64_t start = 0; start < shape.block; start += kTile) {
            load_tile(W, shape, lanes, start, x);
            for (int i = 0; i < kTile; ++i) peak = max(peak, absolute(x[i]));
        }
        store_each(peak, lanes, scale);
        const F inverse = inverse_of(peak);
        for (int64_t start = 0; start < shape.block; start += kTile) {
            if (shape.block > kTile) load_tile(W, shape, lanes, start, x);
            I words[kTileWords];
            encode_words<kSorted>(x, kTileWords, inverse, shape.book, words);
            store_words(words, shape, lanes, start, packed);
        }
    });
    quantize_rest<kSorted>(shape, W, packed, scale);
}

void dequantize_all(const Float4& shape, const uint8_t* packed, const float* scale, float* W) {
    for_whole_blocks(shape, [&](const Lanes& lanes) {
        const F s = load_each(scale, lanes);
        for (int64_t start = 0; start < shape.block; start += kTile) {
            I words[kTileWords];
            F x[kTile];
            load_words(packed, shape, lanes, start, words);
            decode_words(words, kTileWords, s, shape.book, x);
            uint8_t* runs[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) runs[lane] = reinterpret_cast<uint8_t*>(W + lanes.block[lane] * shape.block + start);
            store_runs(x, kTile, runs, lanes.n_lanes);
        }
    });
    const int64_t n_whole = shape.n / shape.block;
    for (int64_t i = n_whole * shape.block; i < shape.n; ++i) W[i] = shape.book.levels[code_at(packed, i)] * scale[n_whole];
}

template <class S>
void measure_all(const Float4& shape, const S* W, const uint8_t* packed, const float* scale, float* error, float* energy) {
    for_whole_blocks(shape, [&](const Lanes& lanes) {
        const F s = load_each(scale, lanes);
        F lost = splat(0.0f), whole = splat(0.0f);
        for (int64_t start = 0; start < shape.block; start += kTile) {
            I words[kTileWords];
            F x[kTile], decoded[kTile];
            load_tile(W, shape, lanes, start, x);
            load_words(packed, shape, lanes, start, words);
            decode_words(words, kTileWords, s, shape.book, decoded);
            for (int i = 0; i < kTile; ++i) {
                const F difference = x[i] - decoded[i];
                lost = lost + difference * difference;
                whole = whole + x[i] * x[i];
            }
        }
        store_each(lost, lanes, error);
        store_each(whole, lanes, energy);
    });
    const int64_t n_whole = shape.n / shape.block;
    if (n_whole * shape.block == shape.n) return;
    float lost = 0.0f, whole = 0.0f;
    for (int64_t i = n_whole * shape.block; i < shape.n; ++i) {
        const float x = weight(W, i), difference = x - shape.book.levels[code_at(packed, i)] * scale[n_whole];
        lost = lost + difference * difference;
        whole = whole + x * x;
    }
    error[n_whole] = lost;
    energy[n_whole] = whole;
}

/// Calls body with W as a pointer of its own type.
template <class Body>
void visit(const void* W, Float dtype, const Body& body) {
    switch (dtype) {
        case Float::bf16:
            return body(static_cast<const Bf16*>(W));
        case Float::f16:
            return body(static_cast<const F16*>(W));
        default:
            return body(static_cast<const float*>(W));
    }
}

Status quantize(const Float4& shape, const void* W, Float dtype, uint8_t* packed, float* scale, void*) {
    visit(W, dtype, [&](const auto* weights) {
        if (shape.book.order)
            quantize_all<false>(shape, weights, packed, scale);
        else
            quantize_all<true>(shape, weights, packed, scale);
    });
    return kOk;
}

Status dequantize(const Float4& shape, const uint8_t* packed, const float* scale, float* W, void*) {
    dequantize_all(shape, packed, scale, W);
    return kOk;
}

Status errors(const Float4& shape, const void* W, Float dtype, const uint8_t* packed, const float* scale, float* error, float* energy,
              void*) {
    visit(W, dtype, [&](const auto* weights) { measure_all(shape, weights, packed, scale, error, energy); });
    return kOk;
}

}  // namespace

extern const Float4Ops float4_ops;
const Float4Ops float4_ops = {quantize, dequantize, errors};

}  // namespace quantcli::QC_ISA
