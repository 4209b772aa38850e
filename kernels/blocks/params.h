// What every block type's text shares: the parameters a block stores, and what its search leaves behind for the coding.
#pragma once

#include "../spmd.h"

namespace quantcli::QC_ISA {

/// A block's stored parameters, one block a lane. Types without sub-block scales or minima leave those untouched.
struct Params {
    I d;          // super-scale, IEEE half
    I dmin;       // super-scale of the minima, IEEE half
    I scale[16];  // integer scale of each sub-block
    I min[8];     // integer minimum of each sub-block
};

/// What the search found. Where a sub-block's effective scale rounds to zero ggml keeps the codes of its search,
/// round(inverse · (x − origin)): so both are kept here.
struct Found {
    Params params;
    F inverse[16];
    F origin[8];
    bool is_weighted;
};

/// Four codes as the bytes of one little-endian word.
QC_FN I bytes_of(I a, I b, I c, I d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }

/// Byte k of a word, unsigned and signed.
QC_FN I byte_at(I word, int k) { return shift_right_logical(word, 8 * k) & 255; }
QC_FN I signed_byte_at(I word, int k) { return (word << (24 - 8 * k)) >> 24; }

}  // namespace quantcli::QC_ISA
