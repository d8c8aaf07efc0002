#include "program.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <set>

#include "forms.h"
#include "memory.h"

namespace ptx {
namespace {

using Text = std::string_view;

[[noreturn]] void unknown(uint32_t line, const std::string& what) {
  throw Unknown("line " + std::to_string(line) + ": " + what);
}

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

Text trimmed(Text x) {
  while (!x.empty() && is_space(x.front())) x.remove_prefix(1);
  while (!x.empty() && is_space(x.back())) x.remove_suffix(1);
  return x;
}

bool starts(Text x, Text with) { return x.substr(0, with.size()) == with; }

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

// The first word, which is taken off; what separates it from the next goes, too.
Text take_word(Text* x) {
  *x = trimmed(*x);
  size_t n = 0;
  while (n < x->size() && !is_space((*x)[n])) ++n;
  const Text word = x->substr(0, n);
  *x = trimmed(x->substr(n));
  return word;
}

// Parts between commas that no bracket encloses.
std::vector<Text> split(Text x) {
  std::vector<Text> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= x.size(); ++i) {
    const char c = i < x.size() ? x[i] : ',';
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c != ',' || depth > 0) continue;
    if (const Text part = trimmed(x.substr(begin, i - begin)); !part.empty()) parts.push_back(part);
    begin = i + 1;
  }
  return parts;
}

// Comments become blanks; lines stay.
std::string without_comments(Text text) {
  std::string out(text);
  for (size_t i = 0; i + 1 < out.size(); ++i) {
    if (out[i] != '/') continue;
    if (out[i + 1] == '/') {
      for (; i < out.size() && out[i] != '\n'; ++i) out[i] = ' ';
    } else if (out[i + 1] == '*') {
      const size_t end = std::min(out.find("*/", i + 2), out.size() - 2) + 2;
      for (; i < end; ++i) out[i] = out[i] == '\n' ? '\n' : ' ';
    }
  }
  return out;
}

uint64_t number(Text x, uint32_t line) {
  uint64_t n = 0;
  const bool negative = starts(x, "-");
  if (negative) x.remove_prefix(1);
  int base = 10;
  if (starts(x, "0x") || starts(x, "0X")) x.remove_prefix(2), base = 16;
  if (!x.empty() && (x.back() == 'U' || x.back() == 'u')) x.remove_suffix(1);
  const auto [end, error] = std::from_chars(x.data(), x.data() + x.size(), n, base);
  if (error != std::errc() || end != x.data() + x.size()) {
    unknown(line, "number " + std::string(x));
  }
  return negative ? 0 - n : n;
}

// Bytes of a type such as b32.
uint64_t size_of(Text type, uint32_t line) {
  if (type == "pred") return 1;
  size_t digits = type.find_first_of("0123456789");
  if (digits == Text::npos || type.find('x') != Text::npos) unknown(line, std::string(type));
  return number(type.substr(digits), line) / 8;
}

const std::map<Text, uint64_t (*)()>& special_registers() {
  using runtime::running;
  static const std::map<Text, uint64_t (*)()> all = {
      {"%tid.x", [] { return uint64_t{running->thread.x}; }},
      {"%tid.y", [] { return uint64_t{running->thread.y}; }},
      {"%tid.z", [] { return uint64_t{running->thread.z}; }},
      {"%ntid.x", [] { return uint64_t{running->block_dim.x}; }},
      {"%ntid.y", [] { return uint64_t{running->block_dim.y}; }},
      {"%ntid.z", [] { return uint64_t{running->block_dim.z}; }},
      {"%ctaid.x", [] { return uint64_t{running->block.x}; }},
      {"%ctaid.y", [] { return uint64_t{running->block.y}; }},
      {"%ctaid.z", [] { return uint64_t{running->block.z}; }},
      {"%nctaid.x", [] { return uint64_t{running->grid_dim.x}; }},
      {"%nctaid.y", [] { return uint64_t{running->grid_dim.y}; }},
      {"%nctaid.z", [] { return uint64_t{running->grid_dim.z}; }},
      {"%laneid", [] { return static_cast<uint64_t>(running->lane); }},
  };
  return all;
}

// Text, and the line that it begins in.
struct Piece {
  Text text;
  uint32_t line;
};

// Shared memory of a module: static variables one after the other, the dynamic ones behind them.
using Addresses = std::map<std::string, uint64_t, std::less<>>;

uint64_t aligned(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

// ".align 8 .b8 name[16]" and the like: the last word is the name.
struct Variable {
  std::string name;
  uint64_t align = 0, size = 0;
  bool open = false;  // name[]: as long as the launch says
};
Variable read_variable(Text text, uint32_t line) {
  Variable v;
  uint64_t element = 0;
  while (starts(text, ".")) {
    const Text word = take_word(&text);
    if (word == ".align") {
      v.align = number(take_word(&text), line);
    } else if (word == ".ptr") {  // what a pointer points to, and its alignment: only a hint
      while (starts(text, ".")) {
        if (take_word(&text) == ".align") take_word(&text);
      }
    } else if (word != ".param" && word != ".shared" && word != ".extern") {
      element = size_of(word.substr(1), line);
    }
  }
  const size_t bracket = text.find('[');
  v.name = trimmed(text.substr(0, bracket));
  uint64_t count = 1;
  if (bracket != Text::npos) {
    const Text inner = trimmed(text.substr(bracket + 1, text.find(']') - bracket - 1));
    v.open = inner.empty();
    count = v.open ? 0 : number(inner, line);
  }
  v.size = element * count;
  if (v.align == 0) v.align = std::max<uint64_t>(element, 1);
  return v;
}

// Behind the last instruction.
void run_past(Thread& t, const Instruction&) { t.fail("a thread ran past the last instruction"); }

// One kernel: from statements to instructions.
class Reader {
 public:
  Reader(Kernel& kernel, const Addresses& shared, std::set<std::string>& unknown)
      : kernel_(kernel), addresses_(shared), unknown_(unknown) {
    scopes_.emplace_back();
    sink_ = kernel_.registers++;
  }

  void add_parameter(Text text, uint32_t line) {
    const Variable v = read_variable(text, line);
    const uint64_t at = aligned(kernel_.parameter_bytes, v.align);
    kernel_.parameters.push_back({at, v.size});
    kernel_.parameter_bytes = at + v.size;
    addresses_[v.name] = kParameterBase + at;
  }

  void read(const std::vector<Piece>& statements) {
    for (const Piece& s : statements) {  // registers first: constants come behind them
      if (starts(s.text, ".reg")) count_registers(s);
    }
    for (const Piece& s : statements) {
      try {
        read(s);
      } catch (const Unknown& u) {
        unknown_.insert(u.what());
      }
    }
    kernel_.code.push_back(
        {.execute = run_past, .line = statements.empty() ? 0 : statements.back().line});
    for (const auto& [index, name] : jumps_) {
      const auto to = labels_.find(name);
      if (to == labels_.end()) {
        unknown_.insert("label " + name);
      } else {
        kernel_.code[index].operand[0] = to->second;
      }
    }
    kernel_.slots = kernel_.registers + kernel_.constants.size() + kernel_.specials.size();
    for (Special& s : kernel_.specials) s.slot += kernel_.registers + kernel_.constants.size();
    for (auto& [index, operand] : special_uses_) {
      kernel_.code[index].operand[operand] += kernel_.registers + kernel_.constants.size();
    }
  }

 private:
  static constexpr uint32_t kMostSlots = 24 * 1024;  // they lie on a fiber's stack

  struct Family {  // %r<10>: %r0 to %r9
    uint32_t first, count;
  };

  void count_registers(const Piece& s) {
    Text rest = s.text;
    take_word(&rest), take_word(&rest);
    for (const Text name : split(rest)) {
      const size_t open = name.find('<');
      const uint64_t n =
          open == Text::npos ? 1 : number(name.substr(open + 1, name.size() - open - 2), s.line);
      kernel_.registers += static_cast<uint32_t>(n);
    }
    if (kernel_.registers > kMostSlots) unknown(s.line, "more registers than the stack holds");
  }

  void declare(const Piece& s) {
    Text rest = s.text;
    take_word(&rest), take_word(&rest);
    for (const Text name : split(rest)) {
      const size_t open = name.find('<');
      const uint32_t n = open == Text::npos
                             ? 1
                             : static_cast<uint32_t>(
                                   number(name.substr(open + 1, name.size() - open - 2), s.line));
      scopes_.back()[std::string(name.substr(0, open))] = {next_register_,
                                                           open == Text::npos ? 0 : n};
      next_register_ += n;
    }
  }

  // The slot of a register, or kNone.
  static constexpr uint32_t kNone = ~0u;
  uint32_t find_register(Text name) const {
    size_t digits = name.size();
    while (digits > 0 && is_digit(name[digits - 1])) --digits;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end() && found->second.count == 0) {
        return found->second.first;
      }
      if (digits == name.size()) continue;
      const auto family = scope->find(name.substr(0, digits));
      if (family == scope->end()) continue;
      uint32_t n = 0;
      std::from_chars(name.data() + digits, name.data() + name.size(), n);
      if (n < family->second.count) return family->second.first + n;
    }
    return kNone;
  }

  uint32_t constant(uint64_t x) {
    const auto [found, is_new] = constants_.try_emplace(x, kernel_.constants.size());
    if (is_new) kernel_.constants.push_back(x);
    return kernel_.registers + found->second;
  }

  // What is read: a register, a number, an address, a special register.
  uint32_t source(Text x, uint32_t line, uint32_t operand) {
    if (const uint32_t slot = find_register(x); slot != kNone) return slot;
    if (const auto special = special_registers().find(x); special != special_registers().end()) {
      special_uses_.push_back({kernel_.code.size(), operand});
      const auto at = static_cast<uint32_t>(kernel_.specials.size());
      for (uint32_t i = 0; i < at; ++i) {
        if (kernel_.specials[i].read == special->second) return i;
      }
      kernel_.specials.push_back({at, special->second});
      return at;
    }
    if (const auto address = addresses_.find(x); address != addresses_.end()) {
      return constant(address->second);
    }
    if (starts(x, "0f") || starts(x, "0F") || starts(x, "0d") || starts(x, "0D")) {
      return constant(number("0x" + std::string(x.substr(2)), line));
    }
    if (x.empty() || !(is_digit(x[0]) || x[0] == '-')) {
      unknown(line, "operand " + std::string(x));
    }
    return constant(number(x, line));
  }
  uint32_t target(Text x, uint32_t line) const {
    if (x == "_") return sink_;
    const uint32_t slot = find_register(x);
    if (slot == kNone) unknown(line, "register " + std::string(x));
    return slot;
  }

  // The operands of a form, or false if they are of another kind.
  bool decode(const std::string& kinds, const std::vector<Text>& operands, uint32_t line,
              Instruction* i) {
    uint32_t at = 0;
    size_t used = 0;
    for (size_t k = 0; k < kinds.size(); ++k) {
      const char kind = kinds[k];
      if (used == operands.size()) return false;
      Text x = operands[used++];
      const bool vector = k + 1 < kinds.size() && is_digit(kinds[k + 1]);
      if (vector) {
        const auto count = static_cast<size_t>(kinds[++k] - '0');
        if (!starts(x, "{")) return false;
        const auto parts = split(x.substr(1, x.size() - 2));
        if (parts.size() != count) return false;
        for (const Text part : parts) {
          i->operand[at] = kind == 'D' ? target(part, line) : source(part, line, at);
          ++at;
        }
        continue;
      }
      if (starts(x, "{")) {  // of one element: Triton writes so
        x = trimmed(x.substr(1, x.size() - 2));
        if (x.find(',') != Text::npos) return false;
      }
      if (starts(x, "[") != (kind == 'a')) return false;
      switch (kind) {
        case 'd':
          i->operand[at++] = target(x, line);
          break;
        case 's':
          i->operand[at] = source(x, line, at);
          ++at;
          break;
        case 'p': {
          const size_t bar = x.find('|');
          i->operand[at++] = target(x.substr(0, bar), line);
          i->operand[at++] = bar == Text::npos ? sink_ : target(x.substr(bar + 1), line);
          break;
        }
        case 'a': {
          x = trimmed(x.substr(1, x.size() - 2));
          const size_t plus = x.find('+');
          const Text offset = plus == Text::npos ? Text("0") : trimmed(x.substr(plus + 1));
          i->operand[at] = source(trimmed(x.substr(0, plus)), line, at);
          ++at;
          i->operand[at++] = constant(number(offset, line));
          break;
        }
        case 'i':
          i->operand[at++] = static_cast<uint32_t>(number(x, line));
          break;
        case 'l':
          jumps_.push_back({kernel_.code.size(), std::string(x)});
          ++at;
          break;
        default:
          unknown(line, std::string("kind ") + kind);
      }
    }
    return used == operands.size();
  }

  void read(const Piece& s) {
    Text text = s.text;
    if (text == "{") {
      scopes_.emplace_back();
    } else if (text == "}") {
      scopes_.pop_back();
    } else if (text.back() == ':') {
      labels_[std::string(text.substr(0, text.size() - 1))] =
          static_cast<uint32_t>(kernel_.code.size());
    } else if (starts(text, ".reg")) {
      declare(s);
    } else if (starts(text, ".pragma")) {
    } else if (starts(text, ".")) {
      unknown(s.line, "directive " + std::string(take_word(&text)));
    } else {
      read_instruction(s);
    }
  }

  void read_instruction(const Piece& s) {
    Text text = s.text;
    Instruction i{.execute = nullptr, .line = s.line};
    if (starts(text, "@")) {
      Text guard = take_word(&text).substr(1);
      i.unless = starts(guard, "!");
      if (i.unless) guard.remove_prefix(1);
      i.guard = target(guard, s.line);
    }
    const std::string name(take_word(&text));
    const std::vector<Form>* const forms = known_forms().find(name);
    if (forms == nullptr) throw Unknown(name);
    const auto operands = split(text);
    for (const Form& form : *forms) {
      if (!decode(form.operands, operands, s.line, &i)) continue;
      i.execute = form.execute;
      kernel_.code.push_back(i);
      return;
    }
    throw Unknown(name + " with operands of other kinds");
  }

  Kernel& kernel_;
  Addresses addresses_;
  std::set<std::string>& unknown_;
  uint32_t sink_, next_register_ = 1;
  std::vector<std::map<std::string, Family, std::less<>>> scopes_;
  std::map<uint64_t, uint32_t> constants_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  std::vector<std::pair<size_t, uint32_t>> special_uses_;
};

// Statements, labels with their colon, and the braces of scopes.
std::vector<Piece> statements(Text body, uint32_t line) {
  std::vector<Piece> found;
  size_t begin = 0;  // of the statement, after spaces
  uint32_t first_line = line;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    line += c == '\n';
    if (begin == i && is_space(c)) {
      ++begin;
      continue;
    }
    if (begin == i) first_line = line;
    const Text so_far = body.substr(begin, i - begin);
    const bool is_brace = (c == '{' || c == '}') && so_far.empty();
    const bool is_label = c == ':' && std::all_of(so_far.begin(), so_far.end(), is_word);
    if (is_brace || is_label) {
      found.push_back({body.substr(begin, i + 1 - begin), first_line});
    } else if (c == ';') {
      if (!so_far.empty()) found.push_back({trimmed(so_far), first_line});
    } else if (c != '\n' || !(starts(so_far, ".loc") || starts(so_far, ".file"))) {
      continue;
    }
    begin = i + 1;
  }
  return found;
}

}  // namespace

std::vector<Kernel> read_module(Text original) {
  const std::string copy = without_comments(original);
  const Text text = copy;
  std::vector<Kernel> kernels;
  std::set<std::string> unknown;
  Addresses shared;
  uint64_t shared_bytes = 0;
  std::vector<std::string> open;
  size_t at = 0;
  uint32_t line = 1;
  auto line_at = [&, seen = size_t{0}](size_t to) mutable {
    for (; seen < to; ++seen) line += text[seen] == '\n';
    return line;
  };
  // Directives, one after the other: each ends with its line, a semicolon or a body in braces.
  while (at < text.size()) {
    if (is_space(text[at])) {
      ++at;
      continue;
    }
    const uint32_t here = line_at(at);
    Text rest = text.substr(at);
    const Text word = take_word(&rest);
    const auto end_of = [&](const char* what) {
      const size_t end = text.find(what, at);
      return end == Text::npos ? text.size() : end;
    };
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") {
      at = end_of("\n");
    } else if (word == ".section") {
      at = end_of("}") + 1;
    } else if (word == ".extern" || word == ".shared") {
      const size_t end = end_of(";");
      const Variable v = read_variable(trimmed(text.substr(at, end - at)), here);
      if (v.open) {
        open.push_back(v.name);
      } else {
        shared_bytes = aligned(shared_bytes, v.align);
        shared[v.name] = kSharedBase + shared_bytes;
        shared_bytes += v.size;
      }
      at = end + 1;
    } else if (word == ".global") {  // a string that nothing refers to: else the operand is unknown
      at = end_of(";") + 1;
    } else if (word == ".visible" || word == ".weak") {
      at += word.size();
    } else if (word == ".entry") {
      for (const std::string& name : open) shared[name] = kSharedBase + aligned(shared_bytes, 128);
      Kernel kernel;
      kernel.static_shared = aligned(shared_bytes, open.empty() ? 1 : 128);
      const size_t open_at = text.find('(', at), close = text.find(')', open_at);
      const size_t body = text.find('{', close);
      kernel.name = trimmed(text.substr(at + word.size(), open_at - at - word.size()));
      Reader reader(kernel, shared, unknown);
      for (const Text p : split(text.substr(open_at + 1, close - open_at - 1))) {
        reader.add_parameter(p, here);
      }
      Text limits = text.substr(close + 1, body - close - 1);
      while (!trimmed(limits).empty()) {
        const Text limit = take_word(&limits);
        if (limit != ".maxntid" && limit != ".reqntid") continue;
        kernel.most_threads = static_cast<uint32_t>(
            number(limits.substr(0, limits.find_first_not_of("0123456789")), here));
      }
      int depth = 1;
      size_t end = body + 1;
      for (; depth > 0 && end < text.size(); ++end)
        depth += (text[end] == '{') - (text[end] == '}');
      reader.read(statements(text.substr(body + 1, end - body - 2), line_at(body)));
      kernels.push_back(std::move(kernel));
      at = end;
    } else {
      throw Unknown("line " + std::to_string(here) + ": directive " + std::string(word));
    }
  }
  if (!unknown.empty()) {
    std::string all;
    for (const std::string& u : unknown) all += (all.empty() ? "" : "\n") + u;
    throw Unknown(all);
  }
  return kernels;
}

}  // namespace ptx
