// The column loop of GPTQ, and of the descent on its codes, of one output row a lane: quantcli/ops/solve.py gives the equations.
#pragma once

#include "../spmd.h"

namespace quantcli::QC_ISA {

/// The code nearest to w on w ≈ scale·q + offset, and what it decodes to. Scale 0 takes the code nearest to 0.
QC_FN F round_affine(F w, F scale, F offset, float lo, float hi, I& code) {
    const F v = select(scale == 0.0f, splat(0.0f), (w - offset) / scale);
    const F q = (min(max(v, splat(lo)), splat(hi)) + kRound) - kRound;  // clamped before or after: the same
    code = truncate(q);
    return scale * q + offset;
}

/// Likewise with the ascending book [n] and the midpoints [n − 1] between its entries; a tie goes to the lower entry.
QC_FN F round_to_book(F w, F scale, F offset, const float* book, const float* mids, int n, I& code) {
    const F v = select(scale == 0.0f, splat(0.0f), (w - offset) / scale);
    F value = splat(book[0]);
    code = splat_int(0);
    for (int i = 1; i < n; ++i) {
        const Mask above = v > mids[i - 1];
        value = select(above, splat(book[i]), value);
        code = select(above, splat_int(i), code);
    }
    return scale * value + offset;
}

/// Columns solved before the rest is touched: each later weight is loaded and stored once for all of them.
constexpr int kFront = 4;

/// Solves kN columns from j on: their weights become their errors, also in e.
template <int kN, class Run, class Round>
QC_FN void solve_front(Run w, const float* U, int n, int j, Round& round, F* e) {
    QC_UNROLL(4)
    for (int a = 0; a < kN; ++a) {
        F x = w[j + a];
        QC_UNROLL(4)
        for (int b = 0; b < a; ++b) x = x - e[b] * U[(j + b) * static_cast<int64_t>(n) + j + a];
        const F error = round.error(j + a, x);
        e[a] = error / splat(U[(j + a) * static_cast<int64_t>(n) + j + a]);
        w[j + a] = e[a];
    }
}

/// w [n] becomes E; round.error(j, x) quantizes weight x of column j, keeps its code and returns what the later columns make up for:
/// x less its decoded value, or in a descent the decoded value less the one before.
template <class Run, class Round>
QC_FN void solve_chunk(Run w, const float* U, int n, Round& round) {
    int j = 0;
    for (; j + kFront <= n; j += kFront) {
        F e[kFront];
        solve_front<kFront>(w, U, n, j, round, e);
        const float* row = U + j * static_cast<int64_t>(n);
        for (int k = j + kFront; k < n; ++k) {
            F x = w[k];
            QC_UNROLL(4)
            for (int a = 0; a < kFront; ++a) x = x - e[a] * row[static_cast<int64_t>(n) * a + k];
            w[k] = x;
        }
    }
    F e[kFront];
    if (n - j == 1) solve_front<1>(w, U, n, j, round, e);
    if (n - j == 2) solve_front<2>(w, U, n, j, round, e);
    if (n - j == 3) solve_front<3>(w, U, n, j, round, e);
}

}  // namespace quantcli::QC_ISA
