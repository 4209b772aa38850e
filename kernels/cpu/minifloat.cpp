// Drivers of the small floats: neighbours in lanes where a run of weights shares a scale, groups in lanes where each has its own.
#include "../blocks/minifloat.h"

#include "lanes.h"
#include "threads.h"

namespace quantcli::QC_ISA {
namespace {

constexpr int64_t kWeightsAtOnce = 1 << 15;
constexpr int kMaxGroup = 32;

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

int64_t pieces_of(int64_t weights) { return weights < kWeightsAtOnce ? kWeightsAtOnce / (weights > 0 ? weights : 1) : 1; }

/// The first n < kLanes elements of a run, zeros after them.
template <class T>
QC_FN F load_some(const T* run, int64_t n) {
    T padded[kLanes] = {};
    std::memcpy(padded, run, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
}

typedef uint8_t Bytes __attribute__((vector_size(QC_LANES)));

QC_FN Bytes narrow(I x) { return __builtin_convertvector(x, Bytes); }

QC_FN I widen(const uint8_t* run) {
    Bytes bytes;
    std::memcpy(&bytes, run, sizeof bytes);
    return __builtin_convertvector(bytes, I);
}

template <class T>
float absmax_of(const T* run, int64_t n) {
    I most = splat_int(0);  // magnitudes compare as integers, and NaN is above infinity
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) most = max(most, bits(absolute(load(run + i))));
    if (i < n) most = max(most, bits(absolute(load_some(run + i, n - i))));
    int32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
    float absmax;
    std::memcpy(&absmax, &found, sizeof absmax);
    return absmax;
}

template <class Format, class T>
void encode_run(const T* run, int64_t n, float scale, uint8_t* data) {
    const F s = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Bytes bytes = narrow(Format::encode(load(run + i) / s));
        std::memcpy(data + i, &bytes, sizeof bytes);
    }
    if (i == n) return;
    const Bytes bytes = narrow(Format::encode(load_some(run + i, n - i) / s));
    std::memcpy(data + i, &bytes, static_cast<size_t>(n - i));
}

template <class Format>
void decode_run(const uint8_t* data, int64_t n, float scale, float* run) {
    const F s = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const F x = Format::decode(widen(data + i)) * s;
        std::memcpy(run + i, &x, sizeof x);
    }
    if (i == n) return;
    uint8_t padded[kLanes] = {};
    std::memcpy(padded, data + i, static_cast<size_t>(n - i));
    const F x = Format::decode(widen(padded)) * s;
    std::memcpy(run + i, &x, static_cast<size_t>(n - i) * sizeof(float));
}

/// Calls body(start, n, scale) for each run of a row that lies in one tile.
template <class Body>
void each_run(const Tiles& tiles, int64_t row, int64_t cols, const Body& body) {
    const int64_t across = (cols + tiles.cols - 1) / tiles.cols;
    const float* scale = tiles.scale + row / tiles.rows * across;
    for (int64_t tile = 0; tile < across; ++tile) {
        const int64_t start = tile * tiles.cols, left = cols - start;
        body(start, left < tiles.cols ? left : tiles.cols, scale[tile]);
    }
}

template <class Body>
void with_format(Float8 format, const Body& body) {
    if (format == Float8::e4m3)
        body(E4M3{});
    else
        body(E5M2{});
}

/// kLanes consecutive groups of a matrix; lanes past the last one repeat it and are not stored.
struct Groups {
    int64_t index[kLanes];
    int n_lanes;

    Groups(int64_t piece, int64_t n_groups) {
        const int64_t left = n_groups - piece * kLanes;
        n_lanes = static_cast<int>(left < kLanes ? left : kLanes);
        for (int lane = 0; lane < kLanes; ++lane) index[lane] = piece * kLanes + (lane < n_lanes ? lane : n_lanes - 1);
    }
};

QC_FN F gather(const Groups& groups, const float* of) {
    F x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = of[groups.index[lane]];
    return x;
}

template <class T>
QC_FN void load_groups(const Groups& groups, const T* data, int64_t group, F* x) {
    const T* runs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = data + groups.index[lane] * group;
    load_runs(runs, static_cast<int>(group), x);
}

template <class Body>
void each_groups(int64_t n_groups, int64_t group, const Body& body) {
    const int64_t n_pieces = (n_groups + kLanes - 1) / kLanes;
    parallel_for(n_pieces, pieces_of(group * kLanes), [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) body(Groups(piece, n_groups));
    });
}

template <Scaled4 kFormat, class T>
void fit_all(const ScaleFit& fit, const T* W) {
    const int64_t across = fit.W.cols / fit.group;
    each_groups(fit.W.rows * across, fit.group, [&](const Groups& groups) {
        F x[kMaxGroup], weight[kMaxGroup];
        const int n = static_cast<int>(fit.group);
        load_groups(groups, W, fit.group, x);
        I start;
        for (int lane = 0; lane < kLanes; ++lane) start[lane] = fit.start[groups.index[lane]];
        I best;
        if (fit.importance) {
            const float* runs[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) runs[lane] = fit.importance + groups.index[lane] % across * fit.group;
            load_runs(runs, n, weight);
            best = best_byte<kFormat, true>(x, weight, n, start, splat(fit.global_scale), fit.first, fit.last);
        } else {
            best = best_byte<kFormat, false>(x, weight, n, start, splat(fit.global_scale), fit.first, fit.last);
        }
        for (int lane = 0; lane < groups.n_lanes; ++lane) fit.found[groups.index[lane]] = static_cast<uint8_t>(best[lane]);
    });
}

Status run_absmax(Weights W, int64_t width, float* absmax, void*) {
    const int64_t across = (W.cols + width - 1) / width;
    visit(W.dtype, [&](auto tag) {
        const auto* data = static_cast<const decltype(tag)*>(W.data);
        parallel_for(W.rows, pieces_of(W.cols), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * across; i < end * across; ++i) {
                const int64_t start = i % across * width, left = W.cols - start;
                absmax[i] = absmax_of(data + i / across * W.cols + start, left < width ? left : width);
            }
        });
    });
    return kOk;
}

Status quantize_fp8(Float8 format, Weights W, Tiles tiles, uint8_t* data, void*) {
    with_format(format, [&](auto bits8) {
        visit(W.dtype, [&](auto tag) {
            const auto* weights = static_cast<const decltype(tag)*>(W.data);
            parallel_for(W.rows, pieces_of(W.cols), [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row)
                    each_run(tiles, row, W.cols, [&](int64_t start, int64_t n, float scale) {
                        encode_run<decltype(bits8)>(weights + row * W.cols + start, n, scale, data + row * W.cols + start);
                    });
            });
        });
    });
    return kOk;
}

Status dequantize_fp8(Float8 format, const uint8_t* data, int64_t rows, int64_t cols, Tiles tiles, float* W, void*) {
    with_format(format, [&](auto bits8) {
        parallel_for(rows, pieces_of(cols), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                each_run(tiles, row, cols, [&](int64_t start, int64_t n, float scale) {
                    decode_run<decltype(bits8)>(data + row * cols + start, n, scale, W + row * cols + start);
                });
        });
    });
    return kOk;
}

Status quantize_fp4(Weights W, const float* step, int64_t group, uint8_t* packed, void*) {
    visit(W.dtype, [&](auto tag) {
        const auto* data = static_cast<const decltype(tag)*>(W.data);
        each_groups(W.rows * W.cols / group, group, [&](const Groups& groups) {
            F x[kMaxGroup];
            load_groups(groups, data, group, x);
            const F s = gather(groups, step);
            for (int k = 0; k < group / 8; ++k) {
                I word = splat_int(0);
                QC_UNROLL(8)
                for (int i = 0; i < 8; ++i) word = word | encode_e2m1(x[8 * k + i] / s) << (4 * i);
                for (int lane = 0; lane < groups.n_lanes; ++lane) {
                    const int32_t eight = word[lane];
                    std::memcpy(packed + groups.index[lane] * (group / 2) + 4 * k, &eight, sizeof eight);
                }
            }
        });
    });
    return kOk;
}

Status dequantize_fp4(const uint8_t* packed, int64_t rows, int64_t cols, const float* step, int64_t group, float* W, void*) {
    each_groups(rows * cols / group, group, [&](const Groups& groups) {
        F x[kMaxGroup];
        const F s = gather(groups, step);
        for (int k = 0; k < group / 8; ++k) {
            I word;
            for (int lane = 0; lane < kLanes; ++lane) {
                int32_t eight;
                std::memcpy(&eight, packed + groups.index[lane] * (group / 2) + 4 * k, sizeof eight);
                word[lane] = eight;
            }
            QC_UNROLL(8)
            for (int i = 0; i < 8; ++i) x[8 * k + i] = decode_e2m1(word >> (4 * i)) * s;
        }
        uint8_t* runs[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) runs[lane] = reinterpret_cast<uint8_t*>(W + groups.index[lane] * group);
        store_runs(x, static_cast<int>(group), runs, groups.n_lanes);
    });
    return kOk;
}

Status fit_fp4(const ScaleFit& fit, void*) {
    visit(fit.W.dtype, [&](auto tag) {
        const auto* W = static_cast<const decltype(tag)*>(fit.W.data);
        if (fit.format == Scaled4::nvfp4)
            fit_all<Scaled4::nvfp4>(fit, W);
        else
            fit_all<Scaled4::mxfp4>(fit, W);
    });
    return kOk;
}

}  // namespace

extern const MinifloatOps minifloat_ops;
const MinifloatOps minifloat_ops = {run_absmax, quantize_fp8, dequantize_fp8, quantize_fp4, dequantize_fp4, fit_fp4};

}  // namespace quantcli::QC_ISA
