// Arithmetic, comparisons, bits and moves.
#include <array>

#include "number.h"

namespace ptx {
namespace {

template <auto f>
constexpr auto of_one = []<class T> { return unary<T, f>; };
template <auto f>
constexpr auto of_two = []<class T> { return binary<T, f>; };
template <auto f>
constexpr auto of_three = []<class T> { return ternary<T, f>; };

// d = a * b + c, where c and d have twice the bits.
template <class T>
void multiply_add_wide(Thread& t, const Instruction& i) {
  t.set(i[0], sum(whole_product(t.get<T>(i[1]), t.get<T>(i[2])), t.get<Twice<T>>(i[3])));
}
// f of three numbers, two at a time.
template <auto f>
void three(Thread& t, const Instruction& i) {
  t.set(i[0], f(f(t.get<float>(i[1]), t.get<float>(i[2])), t.get<float>(i[3])));
}
// f of both halves of pairs.
template <auto f, int inputs>
void pairs(Thread& t, const Instruction& i) {
  const auto half = [&](int operand, int k) {
    return std::bit_cast<float>(static_cast<uint32_t>(t.get<uint64_t>(i[operand]) >> 32 * k));
  };
  uint64_t both = 0;
  for (int k = 0; k < 2; ++k) {
    float x;
    if constexpr (inputs == 2) {
      x = f(half(1, k), half(2, k));
    } else {
      x = f(half(1, k), half(2, k), half(3, k));
    }
    both |= uint64_t{std::bit_cast<uint32_t>(x)} << 32 * k;
  }
  t.set(i[0], both);
}
// A narrow number, widened, and a float.
void add_widened(Thread& t, const Instruction& i) {
  t.set(i[0], value_of(t.get<BFloat16>(i[1])) + t.get<float>(i[2]));
}
template <class T, T (*f)(T, uint32_t)>
void shift(Thread& t, const Instruction& i) {
  t.set(i[0], f(t.get<T>(i[1]), t.get<uint32_t>(i[2])));
}
template <uint32_t (*f)(uint32_t, uint32_t, uint32_t), bool wrap>
void funnel(Thread& t, const Instruction& i) {
  const auto n = t.get<uint32_t>(i[3]);
  t.set(i[0], f(t.get<uint32_t>(i[1]), t.get<uint32_t>(i[2]), wrap ? n & 31 : std::min(n, 32u)));
}
void look_up(Thread& t, const Instruction& i) {
  const auto [a, b, c] =
      std::array{t.get<uint32_t>(i[1]), t.get<uint32_t>(i[2]), t.get<uint32_t>(i[3])};
  t.set(i[0], logical_operation(a, b, c, i[4]));
}
template <class T>
void insert(Thread& t, const Instruction& i) {
  t.set(i[0],
        insert_bits(t.get<T>(i[1]), t.get<T>(i[2]), t.get<uint32_t>(i[3]), t.get<uint32_t>(i[4])));
}
template <class T>
void extract(Thread& t, const Instruction& i) {
  t.set(i[0], extract_bits(t.get<T>(i[1]), t.get<uint32_t>(i[2]), t.get<uint32_t>(i[3])));
}

template <class T>
void move(Thread& t, const Instruction& i) {
  t.set(i[0], t.get<T>(i[1]));
}
// One number of parts, the first in the lowest bits, and the other way round.
template <class Whole, class Part, int n>
void pack(Thread& t, const Instruction& i) {
  Whole whole = 0;
  for (int k = 0; k < n; ++k) {
    whole |= static_cast<Whole>(Whole{t.get<Part>(i[1 + k])} << 8 * sizeof(Part) * k);
  }
  t.set(i[0], whole);
}
template <class Whole, class Part, int n>
void unpack(Thread& t, const Instruction& i) {
  const auto whole = t.get<Whole>(i[n]);  // read first: a part may lie in the same register
  for (int k = 0; k < n; ++k) t.set(i[k], static_cast<Part>(whole >> 8 * sizeof(Part) * k));
}
template <class T>
void select(Thread& t, const Instruction& i) {
  t.set(i[0], t.get<bool>(i[3]) ? t.get<T>(i[1]) : t.get<T>(i[2]));
}

// p = a op b, and q its opposite.
template <class T, auto compare>
void set_predicate(Thread& t, const Instruction& i) {
  bool holds;
  if constexpr (is_narrow<T>) {
    holds = compare(value_of(t.get<T>(i[2])), value_of(t.get<T>(i[3])));
  } else {
    holds = compare(t.get<T>(i[2]), t.get<T>(i[3]));
  }
  t.set(i[0], holds);
  t.set(i[1], !holds);
}
// Of pairs of numbers: p for the low ones, q for the high ones.
template <class T, auto compare>
void set_predicates(Thread& t, const Instruction& i) {
  const auto a = t.get<T>(i[2]), b = t.get<T>(i[3]);
  for (int k = 0; k < 2; ++k)
    t.set(i[k], bool{compare(value_of(part(a, k)), value_of(part(b, k)))});
}
template <auto compare>
constexpr auto comparison = []<class T> { return set_predicate<T, compare>; };

void add_comparisons(Forms& forms) {
#define PTX_COMPARE(name, f)                                                              \
  rows<s16, u16, s32, u32, s64, u64, f32, f64, bf16, f16>(forms, "setp." name ".", "pss", \
                                                          comparison<f>);
  PTX_COMPARE("lt", less)
  PTX_COMPARE("le", at_most)
  PTX_COMPARE("gt", greater)
  PTX_COMPARE("ge", at_least)
#undef PTX_COMPARE
  rows<b16, b32, b64, s16, u16, s32, u32, s64, u64, f32, f64, bf16, f16>(forms, "setp.eq.", "pss",
                                                                         comparison<equal>);
  rows<b16, b32, b64, s16, u16, s32, u32, s64, u64, f32, f64, bf16, f16>(forms, "setp.ne.", "pss",
                                                                         comparison<unequal>);
  rows<f32, f64>(forms, "setp.equ.", "pss", comparison<or_nan<equal>>);
  rows<f32, f64>(forms, "setp.neu.", "pss", comparison<or_nan<unequal>>);
  rows<f32, f64>(forms, "setp.ltu.", "pss", comparison<or_nan<less>>);
  rows<f32, f64>(forms, "setp.leu.", "pss", comparison<or_nan<at_most>>);
  rows<f32, f64>(forms, "setp.gtu.", "pss", comparison<or_nan<greater>>);
  rows<f32, f64>(forms, "setp.geu.", "pss", comparison<or_nan<at_least>>);
  rows<f32, f64>(forms, "setp.num.", "pss", comparison<both_numbers>);
  rows<f32, f64>(forms, "setp.nan.", "pss", comparison<one_is_nan>);
  rows<bf16, f16>(forms, "setp.nan.", "pss", comparison<one_is_nan>);
  rows<bf16x2, f16x2>(forms, "setp.lt.", "pss", []<class T> { return set_predicates<T, less>; });
  rows<bf16x2, f16x2>(forms, "setp.le.", "pss", []<class T> { return set_predicates<T, at_most>; });
  rows<bf16x2, f16x2>(forms, "setp.gt.", "pss", []<class T> { return set_predicates<T, greater>; });
  rows<bf16x2, f16x2>(forms, "setp.ge.", "pss",
                      []<class T> { return set_predicates<T, at_least>; });
  rows<bf16x2, f16x2>(forms, "setp.eq.", "pss", []<class T> { return set_predicates<T, equal>; });
  rows<bf16x2, f16x2>(forms, "setp.ne.", "pss", []<class T> { return set_predicates<T, unequal>; });
  rows<bf16x2, f16x2>(forms, "setp.nan.", "pss",
                      []<class T> { return set_predicates<T, one_is_nan>; });
}

}  // namespace

void add_arithmetic(Forms& forms) {
  rows<s32, s64, f32, f64>(forms, "add.", "dss", of_two<sum>);
  rows<f32, f64>(forms, "add.rn.", "dss", of_two<sum>);
  forms.add("add.rz.f32", "dss", binary<float, sum_towards_zero>);
  rows<s32, s64, f32, f64>(forms, "sub.", "dss", of_two<difference>);
  rows<f32, f64>(forms, "sub.rn.", "dss", of_two<difference>);
  rows<f32, f64>(forms, "mul.", "dss", of_two<product>);
  rows<f32, f64>(forms, "mul.rn.", "dss", of_two<product>);
  rows<s32, s64>(forms, "mul.lo.", "dss", of_two<product>);
  rows<s32, u32>(forms, "mul.hi.", "dss", of_two<high_product>);
  rows<u16, s16, u32, s32>(forms, "mul.wide.", "dss", of_two<whole_product>);
  rows<s32, s64>(forms, "mad.lo.", "dsss", of_three<product_and_sum>);
  rows<u32, s32>(forms, "mad.wide.", "dsss", []<class T> { return multiply_add_wide<T>; });
  rows<f32, f64>(forms, "fma.rn.", "dsss", of_three<fused>);
  forms.add("fma.rn.ftz.f32", "dsss", ternary<float, flushed<fused>>);
  forms.add("fma.rn.f32x2", "dsss", pairs<fused, 3>);
  for (const std::string rounding : {"", "rn."}) {
    forms.add("add." + rounding + "f32x2", "dss", pairs<sum, 2>);
    forms.add("sub." + rounding + "f32x2", "dss", pairs<difference, 2>);
    forms.add("mul." + rounding + "f32x2", "dss", pairs<product, 2>);
  }
  forms.add("add.rn.f32.bf16", "dss", add_widened);
  rows<u16, s32, u32, s64, u64>(forms, "div.", "dss", of_two<quotient>);
  rows<f32, f64>(forms, "div.rn.", "dss", of_two<quotient>);
  rows<f32>(forms, "div.full.", "dss", of_two<quotient>);
  rows<s32, u32, s64, u64>(forms, "rem.", "dss", of_two<remainder>);
  rows<s32, u32, s64, u64, f32, f64>(forms, "min.", "dss", of_two<smaller>);
  rows<s32, u32, s64, u64, f32, f64>(forms, "max.", "dss", of_two<larger>);
  forms.add("max.f32", "dsss", three<larger>);
  forms.add("min.NaN.f32", "dss", binary<float, propagating<smaller>>);
  forms.add("max.NaN.f32", "dss", binary<float, propagating<larger>>);
  rows<s32, s64, f32, f64>(forms, "neg.", "ds", of_one<negative>);
  rows<f32, f64>(forms, "abs.", "ds", of_one<absolute>);
  rows<bf16, f16>(forms, "abs.", "ds", of_one<absolute_narrow>);
  rows<bf16x2, f16x2>(forms, "abs.", "ds", of_one<absolute_pair>);
  forms.add("abs.ftz.f32", "ds", unary<float, flushed<absolute>>);
  rows<f32, f64>(forms, "copysign.", "dss", of_two<sign_of_first>);
  forms.add("ex2.approx.ftz.f32", "ds", unary<float, flushed<power_of_two>>);
  forms.add("lg2.approx.ftz.f32", "ds", unary<float, flushed<logarithm>>);
  forms.add("rcp.approx.ftz.f32", "ds", unary<float, flushed<reciprocal>>);
  forms.add("rcp.approx.ftz.f64", "ds", unary<double, flushed<gross_reciprocal>>);
  rows<f32, f64>(forms, "rcp.rn.", "ds", of_one<reciprocal>);
  rows<f32, f64>(forms, "sqrt.rn.", "ds", of_one<square_root>);
  add_comparisons(forms);

  rows<pred, b16, b32, b64>(forms, "and.", "dss", of_two<bits_of_both>);
  rows<pred, b16, b32, b64>(forms, "or.", "dss", of_two<bits_of_either>);
  rows<pred, b16, b32, b64>(forms, "xor.", "dss", of_two<bits_of_one>);
  rows<pred, b16, b32, b64>(forms, "not.", "ds", of_one<inverted>);
  rows<b16, b32, b64>(forms, "shl.", "dss", []<class T> { return shift<T, shift_left<T>>; });
  rows<u16, s16, u32, s32, u64, s64>(forms, "shr.", "dss",
                                     []<class T> { return shift<T, shift_right<T>>; });
  forms.add("shf.l.wrap.b32", "dsss", funnel<funnel_left, true>);
  forms.add("shf.r.wrap.b32", "dsss", funnel<funnel_right, true>);
  forms.add("shf.l.clamp.b32", "dsss", funnel<funnel_left, false>);
  forms.add("shf.r.clamp.b32", "dsss", funnel<funnel_right, false>);
  forms.add("lop3.b32", "dsssi", look_up);
  forms.add("prmt.b32", "dsss", ternary<uint32_t, permuted>);
  rows<b32, b64>(forms, "bfi.", "dssss", []<class T> { return insert<T>; });
  rows<u32, s32, u64, s64>(forms, "bfe.", "dsss", []<class T> { return extract<T>; });
  constexpr auto ones = [](auto x) { return static_cast<uint32_t>(std::popcount(x)); };
  constexpr auto zeros = [](auto x) { return static_cast<uint32_t>(std::countl_zero(x)); };
  rows<b32, b64>(forms, "popc.", "ds", of_one<ones>);
  rows<b32, b64>(forms, "clz.", "ds", of_one<zeros>);

  rows<pred, b16, u16, b32, u32, f32, b64, u64, f64>(forms, "mov.", "ds",
                                                     []<class T> { return move<T>; });
  forms.add("mov.b32", "dS2", pack<uint32_t, uint16_t, 2>);
  forms.add("mov.b32", "D2s", unpack<uint32_t, uint16_t, 2>);
  forms.add("mov.b64", "dS2", pack<uint64_t, uint32_t, 2>);
  forms.add("mov.b64", "D2s", unpack<uint64_t, uint32_t, 2>);
  rows<b16, u16, b32, u32, s32, f32, b64, u64, f64>(forms, "selp.", "dsss",
                                                    []<class T> { return select<T>; });
}

}  // namespace ptx
