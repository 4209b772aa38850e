// Sixteen levels times a block's scale: the nearest code of a weight, and a code's level.
//
// A block of n weights w_i has s = max |w_i|, and code i is that of the level nearest to w_i · (1 / s), a tie to the lower one. Eight codes
// fill a word, the even weight in the high half of its byte:
//
//   bit 0    4    8    12   16   20   24   28
//       | q1 | q0 | q3 | q2 | q5 | q4 | q7 | q6 |
#pragma once

#include "../float4.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

/// table[index] in each lane, index below 8; eight entries are read. pick16 likewise for sixteen.
#if defined(__AVX512F__) && QC_LANES == 16
QC_FN F pick8(const float* table, I index) {
    return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
}
QC_FN F pick16(const float* table, I index) { return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table)); }
#elif defined(__AVX2__) && QC_LANES == 8
QC_FN F pick8(const float* table, I index) { return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index); }
QC_FN F pick16(const float* table, I index) {  // the index modulo 8 counts; bit 3 moved to the sign chooses between the halves
    const __m256 low = (__m256)pick8(table, index), high = (__m256)pick8(table + 8, index);
    return (F)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
#elif !defined(__CUDACC__)
QC_FN F pick16(const float* table, I index) {
    F x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = table[index[lane]];
    return x;
}
QC_FN F pick8(const float* table, I index) { return pick16(table, index); }
#else
QC_FN F pick16(const float* table, I index) { return table[index]; }
QC_FN F pick8(const float* table, I index) { return table[index]; }
#endif

QC_FN I one_if(Mask m) { return select(m, splat_int(1), splat_int(0)); }

/// The code of the level nearest to v: four steps down the tree of midpoints. NaN gives the lowest level's.
template <bool kSorted>
QC_FN I nearest_level(F v, const Book4& book) {
    I place = one_if(v > splat(book.heap[1]));
    place = place + place + one_if(v > pick8(book.heap + 2, place));
    place = place + place + one_if(v > pick8(book.heap + 4, place));
    place = place + place + one_if(v > pick8(book.heap + 8, place));
    return kSorted ? place : bits(pick16(reinterpret_cast<const float*>(book.order), place));
}

/// What weights are multiplied by. A block of zeros (or nearly) has codes of zero, and no infinity on the way to them.
QC_FN F inverse_of(F peak) { return splat(1.0f) / max(peak, splat(1e-38f)); }

constexpr int kCodesPerWord = 8;

/// Where code k of a word begins.
QC_FN int nibble_shift(int k) { return 4 * (k ^ 1); }

/// The words of x [8·n_words].
template <bool kSorted>
QC_FN void encode_words(const F* x, int n_words, F inverse, const Book4& book, I* words) {
    for (int i = 0; i < n_words; ++i) {
        I word = splat_int(0);
        QC_UNROLL(8)
        for (int k = 0; k < kCodesPerWord; ++k)
            word = word | nearest_level<kSorted>(x[i * kCodesPerWord + k] * inverse, book) << nibble_shift(k);
        words[i] = word;
    }
}

/// The weights x [8·n_words] of words.
QC_FN void decode_words(const I* words, int n_words, F scale, const Book4& book, F* x) {
    for (int i = 0; i < n_words; ++i) {
        QC_UNROLL(8)
        for (int k = 0; k < kCodesPerWord; ++k)
            x[i * kCodesPerWord + k] = pick16(book.levels, shift_right_logical(words[i], nibble_shift(k)) & 15) * scale;
    }
}

}  // namespace quantcli::QC_ISA
