// What every block type's codec shares: the parameters a block stores, and what its search leaves behind for the encoding.
#pragma once

#include "../spmd.h"

namespace quantcli::QC_ISA {

/// A block's stored parameters, one block a lane. A type leaves untouched those that it does not have.
struct Params {
    I d;          // super-scale, IEEE half
    I dmin;       // super-scale of the minima, IEEE half
    I m;          // offset of the whole block, IEEE half
    I scale[16];  // integer scale of each sub-block, or the bits of a small float
    I min[16];    // integer minimum of each sub-block
};

/// What the search found. Where ggml keeps the codes of its search they are round(inverse · (x − origin)): so both are kept here.
struct Found {
    Params params;
    F inverse[16];
    F origin[16];
    bool is_weighted;
    I point[64];  // code books: the point of each run of weights
    I sign[8];    // and the weights' signs, a bit each
};

/// What most codecs are; one that differs says so. A codec also has: kBlock and kSub (weights of a block, of a sub-block), kBytes,
/// search, encode, pack, unpack, decode. `search` takes kAbreast blocks, one after another in x, importance (null without), power (the mean
/// square of each one's whole row, if the codec asks for it) and found; the others one block.
struct Codec {
    static constexpr int kHead = 0, kTail = 0;       // bytes of the outermost scale before and after the block's 32-bit words
    static constexpr bool kHasD = true;              // d; without it the first sub-block's scale is the outermost
    static constexpr bool kHasScales = false;        // a scale for each sub-block
    static constexpr bool kSignedScales = false;     // which is an int8
    static constexpr bool kHasMin = false;           // dmin, and a minimum for each sub-block
    static constexpr bool kHasOffset = false;        // m
    static constexpr bool kWeighted = true;          // the search uses importance
    static constexpr bool kNeedsImportance = false;  // and cannot do without
    static constexpr bool kHasGrid = false;          // magnitudes come from a code book: kGrid
    static constexpr bool kRowPower = false;         // and the mean square of a block's whole row with it
    static constexpr int kAbreast = 1;               // blocks that a lane searches side by side
};

/// 32-bit words of a block.
template <class T>
constexpr int kWords = (T::kBytes - T::kHead - T::kTail) / 4;

/// A sub-block's scale from its byte.
template <class T>
QC_FN int32_t scale_from_byte(uint8_t byte) {
    return T::kSignedScales ? static_cast<int8_t>(byte) : byte;
}

/// What kHead and kTail store.
template <class T>
QC_FN I& outermost(Params& params) {
    return T::kHasD ? params.d : params.scale[0];
}
template <class T>
QC_FN const I& outermost(const Params& params) {
    return T::kHasD ? params.d : params.scale[0];
}

/// Four codes as the bytes of one little-endian word.
QC_FN I bytes_of(I a, I b, I c, I d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }

/// Byte k of a word, unsigned and signed.
QC_FN I byte_at(I word, int k) { return shift_right_logical(word, 8 * k) & 255; }
QC_FN I signed_byte_at(I word, int k) { return (word << (24 - 8 * k)) >> 24; }

/// x = d · scale of its sub-block · value(code): types with a scale for each sub-block and no minimum.
template <class T, class Value>
QC_FN void decode_scaled(const I* codes, const Params& params, F* x, const Value& value) {
    const F d = from_half(params.d);
    for (int j = 0; j < T::kSubs; ++j) {
        const F scale = d * to_float(params.scale[j]);
        for (int i = T::kSub * j; i < T::kSub * (j + 1); ++i) x[i] = scale * value(codes[i]);
    }
}

}  // namespace quantcli::QC_ISA
