// IQ2_XXS, IQ2_XS and IQ2_S: runs of 8 magnitudes from a code book of 256, 512 or 1024 points of 3 levels, w = ±d·(scale + ½)/4·magnitude,
// magnitudes 8, 25, 43.
//
// IQ2_XXS, 8 sub-blocks of 32; of each eight signs seven are stored, as an even number is minus:
//   byte 0      2                                                                    66
//        | d f16 | per sub-block: 4 indices (4) | 4 × 7 signs | scale << 28 (4) (8 × 8) |
//
// IQ2_XS, 16 sub-blocks of 16, signs likewise:
//   byte 0      2                                       66           74
//        | d f16 | 32 × (index | 7 signs << 9) (32 × 2) | scales (8) |
//
// IQ2_S, 16 sub-blocks of 16, all signs stored:
//   byte 0      2                                 34               66                              74           82
//        | d f16 | low 8 bits of 32 indices (32)   | 256 signs (32) | their ninth and tenth bits (8) | scales (8) |
#pragma once

#include "grid_codec.h"

namespace quantcli::QC_ISA {

template <class T>
struct IQ2 : GridCodec<T>, Lattice<8, 3> {
    static constexpr int kWidth = 5;
    static constexpr float kStep = 0.1f, kFudge = 1.0f;

    /// Without importance: IQ2_S alone, the others are not asked.
    QC_FN void weigh(const F* x, const F* importance, F power, F* w) {
        const F sigma2 = T::kPowerFactor * power / 256.0f;
        for (int i = 0; i < T::kSub; ++i)
            w[i] = importance ? importance[i] * square_root(sigma2 + x[i] * x[i]) : 0.25f * sigma2 + x[i] * x[i];
    }

    QC_FN I magnitude(I level) { return level * 17 + 8 + (level >> 1); }
    QC_FN I level(I magnitude) { return select(magnitude >= 43, splat_int(2), select(magnitude >= 25, splat_int(1), splat_int(0))); }
    QC_FN F step(F d, F scale) { return d * (0.5f + scale) * 0.25f; }

    /// 16 scales of four bits in two words.
    QC_FN void pack_scales(const I* scale, I* words) {
        words[0] = words[1] = splat_int(0);
        for (int j = 0; j < 16; ++j) words[j / 8] |= (scale[j] & 15) << (4 * (j % 8));
    }

    QC_FN void unpack_scales(const I* words, I* scale) {
        for (int j = 0; j < 16; ++j) scale[j] = shift_right_logical(words[j / 8], 4 * (j % 8)) & 15;
    }
};

struct IQ2_XXS : IQ2<IQ2_XXS> {
    static constexpr int kSub = 32, kBytes = 66, kSteps = 6;
    static constexpr Grid kGrid = Grid::iq2_xxs;
    static constexpr Refine kRefine = Refine::all;
    static constexpr bool kEvenSigns = true, kNeedsImportance = true;
    static constexpr float kLeastPeak = 1e-15f, kPowerFactor = 1.0f;

    /// Scales are tried around that of the weights rounded to 0 … 4.
    QC_FN void search_sub(const GridTable& table, GridWeights<IQ2_XXS>& sub, GridFit<IQ2_XXS>& fit, I& signs) {
        F start;
        I codes[kSub];
        search_scales<kSub, kLevels + 1>(sub.x, sub.w, codes, start);
        const F reach = start * static_cast<float>(kLevels);
        sub.live = sub.live & ((reach > 0.0f) | (reach != reach));
        search_points<IQ2_XXS>(table, sub, reach, start, fit, signs);
    }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        I index[32], signs[8];
        contract(codes, index, signs);
        for (int j = 0; j < 8; ++j) {
            words[2 * j] = bytes_of(index[4 * j], index[4 * j + 1], index[4 * j + 2], index[4 * j + 3]);
            words[2 * j + 1] = pack_even_signs(signs[j]) | params.scale[j] << 28;
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        I index[32], signs[8];
        for (int k = 0; k < 32; ++k) index[k] = byte_at(words[2 * (k / 4)], k % 4);
        for (int j = 0; j < 8; ++j) {
            signs[j] = unpack_even_signs(words[2 * j + 1]);
            params.scale[j] = shift_right_logical(words[2 * j + 1], 28);
        }
        expand_indices(index, signs, codes);
    }
};

struct IQ2_XS : IQ2<IQ2_XS> {
    static constexpr int kSub = 16, kBytes = 74, kSteps = 9;
    static constexpr Grid kGrid = Grid::iq2_xs;
    static constexpr Refine kRefine = Refine::off_points;
    static constexpr bool kEvenSigns = true, kNeedsImportance = true;
    static constexpr float kLeastPeak = 1e-15f, kPowerFactor = 1.0f;

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        I index[32], signs[8];
        contract(codes, index, signs);
        for (int i = 0; i < 16; ++i) words[i] = splat_int(0);
        for (int k = 0; k < 32; ++k) {
            const I seven = shift_right_logical(signs[k / 4], 8 * (k % 4)) & 127;
            words[k / 2] |= (index[k] | seven << 9) << (16 * (k % 2));
        }
        pack_scales(params.scale, words + 16);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        I index[32], signs[8];
        for (int j = 0; j < 8; ++j) signs[j] = splat_int(0);
        for (int k = 0; k < 32; ++k) {
            const I both = shift_right_logical(words[k / 2], 16 * (k % 2)) & 0xffff;
            index[k] = both & 511;
            signs[k / 4] |= even_signs(shift_right_logical(both, 9)) << (8 * (k % 4));
        }
        unpack_scales(words + 16, params.scale);
        expand_indices(index, signs, codes);
    }
};

struct IQ2_S : IQ2<IQ2_S> {
    static constexpr int kSub = 16, kBytes = 82, kSteps = 9;
    static constexpr Grid kGrid = Grid::iq2_s;
    static constexpr Refine kRefine = Refine::off_points;
    static constexpr bool kEvenSigns = false;
    static constexpr float kLeastPeak = 1e-8f, kPowerFactor = 2.0f, kFudge = 0.9875f;

    /// What was found stays where no block has a scale.
    QC_FN void finish(const GridTable&, F, const Mask*, Found&) {}

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        I index[32];
        contract(codes, index, words + 8);
        for (int i = 0; i < 8; ++i) words[i] = bytes_of(index[4 * i], index[4 * i + 1], index[4 * i + 2], index[4 * i + 3]);
        words[16] = words[17] = splat_int(0);
        for (int k = 0; k < 32; ++k) words[16 + k / 16] |= shift_right_logical(index[k], 8) << (2 * (k % 16));
        pack_scales(params.scale, words + 18);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        I index[32];
        for (int k = 0; k < 32; ++k)
            index[k] = byte_at(words[k / 4], k % 4) | (shift_right_logical(words[16 + k / 16], 2 * (k % 16)) & 3) << 8;
        unpack_scales(words + 18, params.scale);
        expand_indices(index, words + 8, codes);
    }
};

}  // namespace quantcli::QC_ISA
