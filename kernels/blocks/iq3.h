// IQ3_S and IQ3_XXS: 8 sub-blocks of 32 weights, runs of 4 magnitudes from a code book of 512 or 256 points of 8 levels.
//
// IQ3_S, w = ±d·(2·scale + 1)·magnitude, magnitudes 1, 3 … 15:
//   byte 0      2                                 66                       74               106              110
//        | d f16 | low 8 bits of 64 indices (64)   | their ninth bits (8)   | 256 signs (32) | scales (4)     |
//
// IQ3_XXS, w = ±d·(scale + ½)/2·magnitude, magnitudes 4, 12 … 52 and 62; of each eight signs seven are stored, as an even number is minus:
//   byte 0      2                 66                                                      98
//        | d f16 | 64 indices (64) | per sub-block: 4 × 7 signs | scale << 28 (8 × 4)       |
#pragma once

#include "grid_codec.h"

namespace quantcli::QC_ISA {

template <class T>
struct IQ3 : GridCodec<T>, Lattice<4, 8> {
    static constexpr int kSub = 32, kWidth = 15;
    static constexpr float kStep = 0.2f;

    QC_FN void weigh(const F* x, const F* importance, F power, F* w) {
        const F sigma2 = 2.0f * power / 256.0f;
        for (int i = 0; i < kSub; ++i) w[i] = importance ? importance[i] * square_root(sigma2 + x[i] * x[i]) : x[i] * x[i];
    }
};

struct IQ3_S : IQ3<IQ3_S> {
    static constexpr int kBytes = 110, kSteps = 9;
    static constexpr Grid kGrid = Grid::iq3_s;
    static constexpr Refine kRefine = Refine::all_if_any;
    static constexpr bool kEvenSigns = false;
    static constexpr float kLeastPeak = 0.0f, kFudge = 1.033f;

    QC_FN I magnitude(I level) { return level + level + 1; }
    QC_FN I level(I magnitude) { return (magnitude - 1) >> 1; }
    QC_FN F step(F d, F scale) { return d * (1.0f + 2.0f * scale); }

    /// ggml does not go on past the bytes of an all-zero sub-block: low bits and signs of those that follow move to the front, while ninth
    /// bits stay. Its files hold such blocks, so ours do too.
    QC_FN void finish(const GridTable& table, F, const Mask* live, Found& found) {
        Mask all_live = live[0];
        for (int j = 1; j < 8; ++j) all_live = all_live & live[j];
        if (all(all_live)) return;
        I is_live[8];
        for (int j = 0; j < 8; ++j) is_live[j] = select(live[j], splat_int(1), splat_int(0));
        for (int lane = 0; lane < kLanes; ++lane) move_to_front(table, is_live, lane, found);
    }

    QC_FN void move_to_front(const GridTable& table, const I* is_live, int lane, Found& found) {
        int low[64] = {}, high[64], sign[8] = {}, to = 0;
        for (int j = 0; j < 8; ++j) {
            for (int k = 8 * j; k < 8 * j + 8; ++k) {
                const int index = index_of(table, lane_of(found.point[k], lane));
                high[k] = index & 256;
                if (lane_of(is_live[j], lane)) low[8 * to + k % 8] = index & 255;
            }
            if (lane_of(is_live[j], lane)) sign[to++] = lane_of(found.sign[j], lane);
        }
        for (int k = 0; k < 64; ++k) set_lane(found.point[k], lane, table.points[low[k] | high[k]]);
        for (int j = 0; j < 8; ++j) set_lane(found.sign[j], lane, sign[j]);
    }

    /// The index of a point of the code book.
    QC_FN int index_of(const GridTable& table, int point) {
        return table.index[(point & 7) | (point >> 4 & 7) << 3 | (point >> 8 & 7) << 6 | (point >> 12) << 9];
    }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        I index[64];
        contract(codes, index, words + 18);
        for (int i = 0; i < 16; ++i) words[i] = bytes_of(index[4 * i], index[4 * i + 1], index[4 * i + 2], index[4 * i + 3]);
        words[16] = words[17] = words[26] = splat_int(0);
        for (int k = 0; k < 64; ++k) words[16 + k / 32] |= shift_right_logical(index[k], 8) << (k % 32);
        for (int j = 0; j < 8; ++j) words[26] |= (params.scale[j] & 15) << (4 * j);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        I index[64];
        for (int k = 0; k < 64; ++k) index[k] = byte_at(words[k / 4], k % 4) | (shift_right_logical(words[16 + k / 32], k % 32) & 1) << 8;
        expand_indices(index, words + 18, codes);
        for (int j = 0; j < 8; ++j) params.scale[j] = shift_right_logical(words[26], 4 * j) & 15;
    }
};

struct IQ3_XXS : IQ3<IQ3_XXS> {
    static constexpr int kBytes = 98, kSteps = 15;
    static constexpr Grid kGrid = Grid::iq3_xxs;
    static constexpr Refine kRefine = Refine::off_points;
    static constexpr bool kEvenSigns = true;
    static constexpr float kLeastPeak = 1e-8f, kFudge = 1.0125f;

    QC_FN I magnitude(I level) { return level * 8 + 4 + ((level + 1) >> 3) * 2; }
    QC_FN I level(I magnitude) { return min((magnitude - 4) >> 3, splat_int(6)) + select(magnitude >= 62, splat_int(1), splat_int(0)); }
    QC_FN F step(F d, F scale) { return d * (0.5f + scale) * 0.5f; }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        I index[64], signs[8];
        contract(codes, index, signs);
        for (int i = 0; i < 16; ++i) words[i] = bytes_of(index[4 * i], index[4 * i + 1], index[4 * i + 2], index[4 * i + 3]);
        for (int j = 0; j < 8; ++j) words[16 + j] = pack_even_signs(signs[j]) | params.scale[j] << 28;
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        I index[64], signs[8];
        for (int k = 0; k < 64; ++k) index[k] = byte_at(words[k / 4], k % 4);
        for (int j = 0; j < 8; ++j) {
            signs[j] = unpack_even_signs(words[16 + j]);
            params.scale[j] = shift_right_logical(words[16 + j], 28);
        }
        expand_indices(index, signs, codes);
    }
};

}  // namespace quantcli::QC_ISA
