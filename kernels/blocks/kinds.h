// Every block type's codec, and the one of a kind.
#pragma once

#include "../api.h"
#include "affine32.h"
#include "e2m1.h"
#include "iq2.h"
#include "iq3.h"
#include "iq4.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_k.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"
#include "symmetric32.h"
#include "tq.h"

namespace quantcli::QC_ISA {

template <class T>
constexpr KindInfo info_of(const char* name) {
    return {name, T::kBlock, T::kBytes, T::kSub, T::kHasD, T::kHasScales, T::kSignedScales, T::kHasMin, T::kHasOffset, T::kNeedsImportance};
}

#define QC_INFO(kind, codec) info_of<codec>(#kind),
constexpr KindInfo kKindInfo[] = {QC_KINDS(QC_INFO)};
#undef QC_INFO

/// body(T{}) for the codec of `kind`.
template <class Body>
Status with_codec(Kind kind, const Body& body) {
    switch (kind) {
#define QC_CASE(kind, codec) \
    case Kind::kind:         \
        return body(codec{});
        QC_KINDS(QC_CASE)
#undef QC_CASE
    }
    return kOk;
}

}  // namespace quantcli::QC_ISA
