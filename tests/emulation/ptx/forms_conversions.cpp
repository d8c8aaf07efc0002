// cvt: between integers, floating-point numbers, and both.
#include "number.h"

namespace ptx {
namespace {

template <class To, class From, auto f>
void convert(Thread& t, const Instruction& i) {
  t.set<To>(i[0], f(t.get<From>(i[1])));
}
template <class To>
constexpr auto plainly = [](auto x) { return static_cast<To>(x); };
template <class To>
constexpr auto clamped = [](auto x) { return to_integer<To>(x); };
constexpr auto widened = [](auto x) { return value_of(x); };
template <class To>
constexpr auto narrowed = [](float x) { return nearest<To>(x); };

// Two floats, the first in the high half.
template <class Narrow>
void pack(Thread& t, const Instruction& i) {
  const uint32_t high = nearest<Narrow>(t.get<float>(i[1])).bits;
  t.set(i[0], high << 16 | nearest<Narrow>(t.get<float>(i[2])).bits);
}

// From one type of integer to others.
template <class From, class... To>
void integers(Forms& forms) {
  (forms.add(std::string("cvt.") + To::name + "." + From::name, "ds",
             convert<typename To::type, typename From::type, plainly<typename To::type>>),
   ...);
}
template <class... To>
void from_float(Forms& forms) {
  (forms.add(std::string("cvt.rzi.") + To::name + ".f32", "ds",
             convert<typename To::type, float, clamped<typename To::type>>),
   ...);
}
template <class To, class... From>
void to_float(Forms& forms) {
  (forms.add(std::string("cvt.rn.") + To::name + "." + From::name, "ds",
             convert<typename To::type, typename From::type, plainly<typename To::type>>),
   ...);
}

}  // namespace

void add_conversions(Forms& forms) {
  integers<s8, s16, s32, s64>(forms);
  integers<u8, u16, u32, u64>(forms);
  integers<u16, u8, u32, s32, u64>(forms);
  integers<s16, s32, s64>(forms);
  integers<u32, u8, u16, u64, s64>(forms);
  integers<s32, s8, u16, s64>(forms);
  integers<u64, u16, u32>(forms);
  from_float<s32, u32, s64>(forms);
  to_float<f32, s32, u32, s64, u64, f64>(forms);
  to_float<f64, s32, u32, s64, u64>(forms);
  forms.add("cvt.f64.f32", "ds", convert<double, float, plainly<double>>);
  forms.add("cvt.f32.f16", "ds", convert<float, Half, widened>);
  forms.add("cvt.f32.bf16", "ds", convert<float, BFloat16, widened>);
  forms.add("cvt.rn.f16.f32", "ds", convert<Half, float, narrowed<Half>>);
  forms.add("cvt.rn.bf16.f32", "ds", convert<BFloat16, float, narrowed<BFloat16>>);
  forms.add("cvt.rn.f16x2.f32", "dss", pack<Half>);
  forms.add("cvt.rn.bf16x2.f32", "dss", pack<BFloat16>);
}

}  // namespace ptx
