// What ggml's code-book types share: 256 weights in sub-blocks of 16 or 32 with a 4-bit scale, w = ±step(d, scale)·magnitude, and a point
// of the code book for the magnitudes of each run of 4 or 8. Codes are magnitudes with their signs.
#pragma once

#include "grid_search.h"

namespace quantcli::QC_ISA {

/// T is the type, a Lattice with kGrid and kSub, the constants of its search, `weigh`, `magnitude` and `level`, `step` and its own packing.
template <class T>
struct GridCodec : Codec {
    static constexpr int kBlock = 256, kHead = 2;
    static constexpr bool kHasScales = true, kSignedScales = true, kHasGrid = true;

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        const GridTable& table = table_of(T::kGrid);
        F power = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) power += x[i] * x[i];
        for (int j = 0; j < 8; ++j) found->sign[j] = splat_int(0);
        F scale[kBlock / T::kSub], top = splat(0.0f);
        Mask live[kBlock / T::kSub], lost = splat_mask(false);
        for (int j = 0; j < kBlock / T::kSub; ++j) {
            GridWeights<T> sub;
            GridFit<T> fit;
            T::weigh(x + T::kSub * j, importance ? importance + T::kSub * j : nullptr, power, sub.w);
            I signs = prepare_weights<T>(x + T::kSub * j, sub);
            T::search_sub(table, sub, fit, signs);
            for (int k = 0; k < kRuns<T>; ++k) found->point[kRuns<T> * j + k] = select(sub.live, fit.points[k], splat_int(0));
            found->sign[T::kSub * j / 32] |= T::kSub == 32 ? signs : (signs & 0xffff) << (16 * (j % 2));
            live[j] = sub.live;
            scale[j] = select(fit.lost, splat(0.0f), fit.scale);
            top = max(top, scale[j]);
            lost = lost | fit.lost;
        }
        store_scales(scale, top, found->params);
        // Where ggml has no answer but aborts, the scale is none.
        found->params.d = select(lost, splat_int(0x7e00), found->params.d);
        T::finish(table, top, live, *found);
    }

    QC_FN void store_scales(const F* scale, F top, Params& params) {
        const F d = top / 31.0f, inverse = 1.0f / d;
        for (int j = 0; j < kBlock / T::kSub; ++j)
            params.scale[j] = max(min(nearest_int(0.5f * (inverse * scale[j] - 1.0f)), splat_int(15)), splat_int(0));
        params.d = to_half(d * T::kFudge);
    }

    /// A block without a scale has no points nor signs.
    QC_FN void finish(const GridTable&, F top, const Mask*, Found& found) {
        for (int k = 0; k < kBlock / T::kRun; ++k) found.point[k] = select(top == 0.0f, splat_int(0), found.point[k]);
        for (int j = 0; j < 8; ++j) found.sign[j] = select(top == 0.0f, splat_int(0), found.sign[j]);
    }

    QC_FN void search_sub(const GridTable& table, GridWeights<T>& sub, GridFit<T>& fit, I& signs) {
        search_points<T>(table, sub, sub.peak, sub.peak / static_cast<float>(T::kWidth), fit, signs);
    }

    QC_FN void encode(const F*, const Found& found, I* codes) { expand(found.point, found.sign, codes); }

    /// Codes of points [256 / kRun] and signs [8].
    QC_FN void expand(const I* points, const I* signs, I* codes) {
        for (int i = 0; i < kBlock; ++i) {
            const I level = shift_right_logical(points[i / T::kRun], T::kBits * (i % T::kRun)) & T::kFieldMask;
            const I minus = splat_int(0) - (shift_right_logical(signs[i / 32], i % 32) & 1);
            codes[i] = (T::magnitude(level) ^ minus) - minus;
        }
    }

    /// The index of each run's point [256 / kRun], and the signs [8]. A magnitude between two levels counts as the lower, and a run that
    /// is no point as the one nearest to it.
    QC_FN void contract(const I* codes, I* indices, I* signs) {
        const GridTable& table = table_of(T::kGrid);
        for (int k = 0; k < kBlock / T::kRun; ++k) {
            I cell = splat_int(0);
            for (int i = T::kRun; i-- > 0;) {
                const I code = codes[T::kRun * k + i];
                const I level = T::level(max(code, splat_int(0) - code));
                cell = cell * T::kLevels + max(min(level, splat_int(T::kLevels - 1)), splat_int(0));
            }
            for (int lane = 0; lane < kLanes; ++lane) set_lane(indices[k], lane, table.index[lane_of(cell, lane)]);
        }
        for (int j = 0; j < 8; ++j) {
            signs[j] = splat_int(0);
            for (int i = 0; i < 32; ++i) signs[j] |= shift_right_logical(codes[32 * j + i], 31) << i;
        }
    }

    QC_FN void expand_indices(const I* indices, const I* signs, I* codes) {
        const GridTable& table = table_of(T::kGrid);
        I points[kBlock / T::kRun];
        for (int k = 0; k < kBlock / T::kRun; ++k)
            for (int lane = 0; lane < kLanes; ++lane) set_lane(points[k], lane, table.points[lane_of(indices[k], lane)]);
        expand(points, signs, codes);
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int j = 0; j < kBlock / T::kSub; ++j) {
            const F step = T::step(d, to_float(params.scale[j]));
            for (int i = T::kSub * j; i < T::kSub * (j + 1); ++i) x[i] = step * to_float(codes[i]);
        }
    }
};

/// Four sets of eight signs, an even number of them minus, in 28 bits: the last of each set follows from the others.
QC_FN I pack_even_signs(I signs) {
    I packed = splat_int(0);
    for (int k = 0; k < 4; ++k) packed |= (shift_right_logical(signs, 8 * k) & 127) << (7 * k);
    return packed;
}

/// The eight signs in the low seven bits.
QC_FN I even_signs(I seven) {
    I parity = seven ^ shift_right_logical(seven, 4);
    parity ^= shift_right_logical(parity, 2);
    parity ^= shift_right_logical(parity, 1);
    return seven | (parity & 1) << 7;
}

QC_FN I unpack_even_signs(I packed) {
    I signs = splat_int(0);
    for (int k = 0; k < 4; ++k) signs |= even_signs(shift_right_logical(packed, 7 * k) & 127) << (8 * k);
    return signs;
}

}  // namespace quantcli::QC_ISA
