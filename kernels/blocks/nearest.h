// The point of a code book nearest to a run of weights: ggml's iq2_find_best_neighbour and iq3_find_best_neighbour.
//
// Each lane's list has its own length, so lanes that walked theirs side by side would wait for the longest. Here a list's candidates are
// the lanes instead, and the runs come one after another. Still nothing is added across lanes: a candidate's distance is one sum.
#pragma once

#include "../grids.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

constexpr float kLargest = 0x1.fffffep+127f;

#ifdef __CUDACC__
/// The tables on this device: the driver fills them before the first launch that needs them.
static __device__ GridTable device_grids[kGrids];
QC_FN const GridTable& table_of(Grid grid) { return device_grids[static_cast<int>(grid)]; }
#else
QC_FN const GridTable& table_of(Grid grid) { return grid_table(grid); }
#endif

/// How a code book's points are packed.
template <int kRun_, int kLevels_>
struct Lattice {
    static constexpr int kRun = kRun_, kLevels = kLevels_, kBits = 16 / kRun;
    static constexpr int kFieldMask = (1 << kBits) - 1;
};

/// The nearest point to weights x [kRun] of one lane, by a plain walk; −1 where no distance is below the largest float: ggml aborts there.
template <class L>
QC_FN int walk_candidates(const GridTable& table, uint32_t list, const F* x, const F* w, float scale, int lane) {
    const uint16_t* candidate = table.candidates + start_of(list) * kCandidatesAtOnce;
    if (is_point(list)) return candidate[0];
    float cost[L::kRun][L::kLevels];
    for (int i = 0; i < L::kRun; ++i) {
        for (int level = 0; level < L::kLevels; ++level) {
            const float diff = scale * static_cast<float>(2 * level + 1) - lane_of(x[i], lane);
            cost[i][level] = lane_of(w[i], lane) * diff * diff;
        }
    }
    float best = kLargest;
    int nearest = -1;
    for (uint32_t j = 0; j < length_of(list); ++j) {
        float distance = 0.0f;
        for (int i = 0; i < L::kRun; ++i) distance += cost[i][candidate[j] >> (L::kBits * i) & L::kFieldMask];
        if (distance < best) {
            best = distance;
            nearest = candidate[j];
        }
    }
    return nearest;
}

#if defined(__AVX2__) && !defined(__CUDACC__)

/// The entry of each axis' table that every candidate has there. Candidates' bits above their field do not count.
template <class L>
QC_FN __m256 distances(const __m256* cost, __m256i points) {
    __m256 sum;
    for (int i = 0; i < L::kRun; ++i) {
        const __m256i level = _mm256_srli_epi32(points, L::kBits * i);
        const __m256 term = L::kLevels == 8 ? _mm256_permutevar8x32_ps(cost[i], level) : _mm256_permutevar_ps(cost[i], level);
        sum = i ? _mm256_add_ps(sum, term) : term;
    }
    return _mm256_min_ps(sum, _mm256_set1_ps(kLargest));  // NaN too
}

QC_FN __m256 least(__m256 x) {
    x = _mm256_min_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_min_ps(x, _mm256_shuffle_ps(x, x, 0x4e));
    return _mm256_min_ps(x, _mm256_shuffle_ps(x, x, 0xb1));
}

QC_FN __m256i load_points(const uint16_t* candidate) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(candidate)));
}

/// The first candidate of least distance, and that distance in every element of `smallest`. A list of up to eight is one vector.
template <class L>
QC_FN int first_nearest(const __m256* cost, const uint16_t* candidate, uint32_t n, __m256& smallest) {
    const __m256 first = distances<L>(cost, load_points(candidate));
    if (n <= kCandidatesAtOnce) {
        smallest = least(first);
        return candidate[__builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(first, smallest, _CMP_EQ_OQ))))];
    }
    __m256 best = first;
    __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), best_place = place;
    for (uint32_t j = kCandidatesAtOnce; j < n; j += kCandidatesAtOnce) {
        const __m256 distance = distances<L>(cost, load_points(candidate + j));
        place = _mm256_add_epi32(place, _mm256_set1_epi32(kCandidatesAtOnce));
        const __m256 closer = _mm256_cmp_ps(distance, best, _CMP_LT_OQ);
        best = _mm256_min_ps(distance, best);
        best_place = _mm256_blendv_epi8(best_place, place, _mm256_castps_si256(closer));
    }
    smallest = least(best);
    const __m256i equal = _mm256_castps_si256(_mm256_cmp_ps(best, smallest, _CMP_EQ_OQ));
    __m256i at = _mm256_blendv_epi8(_mm256_set1_epi32(INT32_MAX), best_place, equal);
    at = _mm256_min_epi32(at, _mm256_permute2x128_si256(at, at, 1));
    at = _mm256_min_epi32(at, _mm256_shuffle_epi32(at, 0x4e));
    at = _mm256_min_epi32(at, _mm256_shuffle_epi32(at, 0xb1));
    return candidate[_mm_cvtsi128_si32(_mm256_castsi256_si128(at))];
}

/// One lane of nearest_points; false where one of its runs may have found nothing.
template <class L, int kRuns>
QC_FN bool nearest_in_lane(const GridTable& table, const F* x, const F* w, float scale, int lane, const I* lists, I* points) {
    const __m256 levels = L::kLevels == 8 ? _mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15) : _mm256_setr_ps(1, 3, 5, 7, 1, 3, 5, 7);
    const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(scale), levels);
    __m256 farthest = _mm256_setzero_ps();
    for (int k = 0; k < kRuns; ++k) {
        __m256 cost[L::kRun];
        for (int i = 0; i < L::kRun; ++i) {
            const __m256 diff = _mm256_sub_ps(scaled, _mm256_set1_ps(x[L::kRun * k + i][lane]));
            cost[i] = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(w[L::kRun * k + i][lane]), diff), diff);
        }
        const uint32_t list = table.lists[lists[k][lane]];
        __m256 smallest;
        points[k][lane] = first_nearest<L>(cost, table.candidates + start_of(list) * kCandidatesAtOnce, length_of(list), smallest);
        farthest = _mm256_max_ps(farthest, smallest);
    }
    return _mm256_cvtss_f32(farthest) < kLargest;
}

#else

/// Elsewhere every run is walked.
template <class L, int kRuns>
QC_FN bool nearest_in_lane(const GridTable&, const F*, const F*, float, int, const I*, I*) {
    return false;
}

#endif

/// points[k] = the first point of least Σ w·(scale·q − x)² in the list numbered lists[k], k < kRuns, of runs of weights one after another
/// in x and w. Lanes of `lost` become true where ggml would abort: no distance is a number below the largest.
template <class L, int kRuns>
QC_CALL void nearest_points(const GridTable& table, const F* x, const F* w, const F& scale, const I* lists, I* points, Mask& lost) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const float lane_scale = lane_of(scale, lane);
        if (nearest_in_lane<L, kRuns>(table, x, w, lane_scale, lane, lists, points)) continue;
        for (int k = 0; k < kRuns; ++k) {
            const uint32_t list = table.lists[lane_of(lists[k], lane)];
            const int point = walk_candidates<L>(table, list, x + L::kRun * k, w + L::kRun * k, lane_scale, lane);
            set_lane(points[k], lane, point < 0 ? 0 : point);
            if (point < 0) set_lane(lost, lane, -1);
        }
    }
}

}  // namespace quantcli::QC_ISA
