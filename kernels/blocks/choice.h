// Which of several grids leaves a group of weights the smallest output error, eᵀ·B·e: quantcli/ops/choice.py says what for.
//
// The grids tried are near to each other, so most weights keep their code from one to the next. With e₀, s₀, o₀ of the first grid, d the
// codes since then less those of the first, and r = s/s₀::
//
//     e = r·e₀ + (1 − r)·w − s·d − (o − r·o₀)
//
// B·e₀, B·w and B·1 are found once and B·d is kept: each code that changes adds its change times a column of B, a few columns a grid, where
// a product would take all. (B·w − s·B·q − o·B·1 says the same, but of large terms, whose rounding is then large beside a small B·e.) Each
// row has its own changes, which rows side by side would wait for, so the lanes are a row's columns here: a vector of them on the CPU, a
// warp's threads on CUDA. The one sum across lanes is a tree of fixed shape over 32 partial sums: the same on every width.
#pragma once

#include "../solve.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

constexpr int kSums = 32;

#ifdef __CUDACC__

constexpr int kTeam = 32;
constexpr unsigned kEveryThread = 0xffffffffu;

QC_FN F load_team(const float* p) { return p[threadIdx.x % kTeam]; }
QC_FN uint32_t lanes_of(Mask m) { return __ballot_sync(kEveryThread, m); }
QC_FN float of_team(F x, int lane) { return __shfl_sync(kEveryThread, x, lane); }
QC_FN int lowest(uint32_t lanes) { return __ffs(static_cast<int>(lanes)) - 1; }
QC_FN float sum_team(F x) {
    for (int half = kTeam / 2; half; half /= 2) x = x + __shfl_xor_sync(kEveryThread, x, half);
    return x;
}

#else

constexpr int kTeam = kLanes;

QC_FN F load_team(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
QC_FN uint32_t lanes_of(Mask m) {
#if defined(__AVX512DQ__) && QC_LANES == 16
    return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__) && QC_LANES == 8
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
#elif defined(__SSE2__) && QC_LANES == 4
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)m));
#else
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= static_cast<uint32_t>(m[lane] & 1) << lane;
    return lanes;
#endif
}
QC_FN float of_team(const F& x, int lane) { return x[lane]; }
QC_FN int lowest(uint32_t lanes) { return __builtin_ctz(lanes); }
QC_FN float sum_team(F x) {
    for (int half = kTeam / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) x[lane] = x[lane] + x[lane + half];
    return x[0];
}

#endif

/// One group of a row: kColumns weights in slices of kTeam. B [kColumns, kColumns] is the group's symmetric block.
template <int kColumns_>
struct GroupChoice {
    static constexpr int kColumns = kColumns_, kSlices = kColumns / kTeam, kParts = kSums / kTeam;
    const float* B;
    float lo, hi;
    float first_scale, first_offset;
    F w[kSlices], q[kSlices];                              // q: codes on the grid tried last
    F B1[kSlices], Bw[kSlices], Be[kSlices], Bd[kSlices];  // Be: of the first grid's errors
};

/// product = product + B[:, j]·x
template <int kColumns>
QC_FN void add_column(const float* B, int j, float x, F* product) {
    QC_UNROLL(16)
    for (int s = 0; s < kColumns / kTeam; ++s) product[s] = product[s] + load_team(B + j * kColumns + s * kTeam) * x;
}

/// The nearest codes of slice s on w ≈ scale·q + offset. Scale 0 takes the code nearest to 0.
template <int kColumns>
QC_FN F codes_of(const GroupChoice<kColumns>& group, int s, float scale, float offset) {
    const F v = scale == 0.0f ? splat(0.0f) : (group.w[s] - offset) / splat(scale);
    return (min(max(v, splat(group.lo)), splat(group.hi)) + kRound) - kRound;  // clamped before or after: the same
}

template <int kColumns>
QC_FN void enter_block(GroupChoice<kColumns>& group, const float* B) {
    group.B = B;
    for (int s = 0; s < group.kSlices; ++s) group.B1[s] = splat(0.0f);
    for (int j = 0; j < kColumns; ++j) add_column<kColumns>(B, j, 1.0f, group.B1);
}

/// Takes the group of another row, at `w`, and its first grid.
template <int kColumns>
QC_FN void enter_row(GroupChoice<kColumns>& group, const float* w, float scale, float offset) {
    group.first_scale = scale;
    group.first_offset = offset;
    for (int s = 0; s < group.kSlices; ++s) {
        group.w[s] = load_team(w + s * kTeam);
        group.q[s] = codes_of(group, s, scale, offset);
        group.Bw[s] = group.Be[s] = group.Bd[s] = splat(0.0f);
    }
    for (int s = 0; s < group.kSlices; ++s) {
        const F e = group.w[s] - (group.q[s] * scale + offset);
        for (int lane = 0; lane < kTeam; ++lane) {
            add_column<kColumns>(group.B, s * kTeam + lane, w[s * kTeam + lane], group.Bw);
            add_column<kColumns>(group.B, s * kTeam + lane, of_team(e, lane), group.Be);
        }
    }
}

/// Moves q to the nearest codes on another grid, and Bd with it.
template <int kColumns>
QC_FN void recode(GroupChoice<kColumns>& group, float scale, float offset) {
    QC_UNROLL(16)
    for (int s = 0; s < group.kSlices; ++s) {
        const F code = codes_of(group, s, scale, offset);
        const F change = code - group.q[s];
        group.q[s] = code;
        for (uint32_t left = lanes_of(change != 0.0f); left; left &= left - 1) {
            const int lane = lowest(left);
            add_column<kColumns>(group.B, s * kTeam + lane, of_team(change, lane), group.Bd);
        }
    }
}

/// eᵀ·B·e of the codes held.
template <int kColumns>
QC_FN float error_of(const GroupChoice<kColumns>& group, float scale, float offset) {
    constexpr int kParts = GroupChoice<kColumns>::kParts;
    const float ratio = group.first_scale == 0.0f ? 1.0f : scale / group.first_scale, rest = 1.0f - ratio;
    const float moved = offset - ratio * group.first_offset;
    F sum[kParts];
    for (int part = 0; part < kParts; ++part) sum[part] = splat(0.0f);
    QC_UNROLL(16)
    for (int s = 0; s < group.kSlices; ++s) {
        const F e = group.w[s] - (group.q[s] * scale + offset);
        const F Be = ((group.Be[s] * ratio + group.Bw[s] * rest) - group.Bd[s] * scale) - group.B1[s] * moved;
        sum[s % kParts] = sum[s % kParts] + e * Be;
    }
    for (int half = kParts / 2; half; half /= 2)
        for (int part = 0; part < half; ++part) sum[part] = sum[part] + sum[part + half];
    return sum_team(sum[0]);
}

/// The first grid with the smallest error for group g of a row; a NaN never wins.
template <int kColumns>
QC_FN void choose_of_row(const GridChoice& choice, GroupChoice<kColumns>& group, int64_t row, int64_t g) {
    const int64_t n_groups = choice.cols / kColumns, stride = choice.rows * n_groups, at = row * n_groups + g;
    enter_row(group, choice.W + row * choice.cols + g * kColumns, choice.scale[at], choice.offset ? choice.offset[at] : 0.0f);
    float least = INFINITY;
    int best = 0;
    for (int c = 0; c < choice.n_candidates; ++c) {
        const float scale = choice.scale[c * stride + at], offset = choice.offset ? choice.offset[c * stride + at] : 0.0f;
        recode(group, scale, offset);
        const float error = error_of(group, scale, offset);
        if (!(error < least)) continue;
        least = error;
        best = c;
    }
    choice.best[at] = best;
}

/// Calls body(GroupChoice<columns>{}); columns is 32, 64, 128 or 256.
template <class Body>
void with_group(int64_t columns, const Body& body) {
    switch (columns) {
        case 32:
            return body(GroupChoice<32>{});
        case 64:
            return body(GroupChoice<64>{});
        case 128:
            return body(GroupChoice<128>{});
        default:
            return body(GroupChoice<256>{});
    }
}

}  // namespace quantcli::QC_ISA
