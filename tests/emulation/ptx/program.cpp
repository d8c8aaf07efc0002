#include "program.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <set>

#include "forms.h"
#include "memory.h"
#include "registers.h"

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
bool encloses(char open, Text x, char close) {
  return x.size() >= 2 && x.front() == open && x.back() == close;
}
Text inside(Text x) { return trimmed(x.substr(1, x.size() - 2)); }

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
  if (trimmed(x).empty()) return parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= x.size(); ++i) {
    const char c = i < x.size() ? x[i] : ',';
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c != ',' || depth > 0) continue;
    parts.push_back(trimmed(x.substr(begin, i - begin)));
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
      --i;
    }
  }
  return out;
}

// Decimal, 0x, 0b, or octal behind a 0; U is no more than a type.
uint64_t number(Text x, uint32_t line) {
  const Text whole = x;
  const bool negative = starts(x, "-");
  if (negative) x.remove_prefix(1);
  if (x.size() > 1 && x.back() == 'U') x.remove_suffix(1);
  int base = 10;
  if (starts(x, "0x") || starts(x, "0X")) {
    x.remove_prefix(2), base = 16;
  } else if (starts(x, "0b") || starts(x, "0B")) {
    x.remove_prefix(2), base = 2;
  } else if (x.size() > 1 && x.front() == '0') {
    x.remove_prefix(1), base = 8;
  }
  uint64_t n = 0;
  const auto [end, error] = std::from_chars(x.data(), x.data() + x.size(), n, base);
  if (error != std::errc() || end != x.data() + x.size()) {
    unknown(line, "number " + std::string(whole));
  }
  return negative ? 0 - n : n;
}

// Bytes of a type.
uint64_t size_of(Text type, uint32_t line) {
  static const std::map<Text, uint64_t> all = {{".pred", 1}, {".b8", 1},  {".u8", 1},  {".s8", 1},
                                               {".b16", 2},  {".u16", 2}, {".s16", 2}, {".f16", 2},
                                               {".b32", 4},  {".u32", 4}, {".s32", 4}, {".f32", 4},
                                               {".b64", 8},  {".u64", 8}, {".s64", 8}, {".f64", 8}};
  const auto found = all.find(type);
  if (found == all.end()) unknown(line, "type " + std::string(type));
  return found->second;
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

// Of variables, by name.
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
      element = size_of(word, line);
    }
  }
  const size_t bracket = text.find('[');
  v.name = trimmed(text.substr(0, bracket));
  uint64_t count = 1;
  if (bracket != Text::npos) {
    const Text length = text.substr(bracket);
    if (!encloses('[', length, ']') || length.rfind('[') > 0)
      unknown(line, "variable " + std::string(text));
    v.open = inside(length).empty();
    count = v.open ? 0 : number(inside(length), line);
  }
  if (element == 0 || v.name.empty() || !std::all_of(v.name.begin(), v.name.end(), is_word)) {
    unknown(line, "variable " + std::string(text));
  }
  v.size = element * count;
  if (v.align == 0) v.align = element;
  return v;
}

// Static variables one after the other, and the dynamic ones, which share what is behind them.
struct SharedMemory {
  Addresses addresses;
  uint64_t bytes = 0, open_align = 1;
  std::vector<std::string> open;

  void add(const Piece& declaration) {
    const Variable v = read_variable(declaration.text, declaration.line);
    if (v.open) {
      open.push_back(v.name);
      open_align = std::max(open_align, v.align);
      return;
    }
    bytes = aligned(bytes, v.align);
    addresses[v.name] = kSharedBase + bytes;
    bytes += v.size;
  }
};

// Behind the last instruction.
void run_past(Thread& t, const Instruction&) { t.fail("a thread ran past the last instruction"); }

// One kernel: from statements to instructions.
class Reader {
 public:
  Reader(Kernel& kernel, const SharedMemory& of_module, std::set<std::string>& unknown)
      : kernel_(kernel), shared_(of_module), unknown_(unknown) {
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
    for (const Piece& s : statements) {  // first, for constants come behind the registers
      if (starts(s.text, ".reg")) {
        for (const auto& [name, family] : registers_of(s)) kernel_.registers += family.size();
      } else if (is_shared(s.text)) {
        shared_.add(s);
      }
    }
    lay_out_shared();
    scopes_.emplace_back();
    for (const Piece& s : statements) {
      try {
        read(s);
      } catch (const Unknown& u) {
        unknown_.insert(u.what());
      }
    }
    kernel_.code.push_back({.execute = run_past,
                            .kinds = "",
                            .line = statements.empty() ? 0 : statements.back().line});
    while (!scopes_.empty()) close_scope();
    const auto constants_end = static_cast<uint32_t>(kernel_.registers + kernel_.constants.size());
    for (Special& s : kernel_.specials) s.slot += constants_end;
    for (auto& [index, operand] : special_uses_) {
      kernel_.code[index].operand[operand] += constants_end;
    }
    kernel_.slots = constants_end + kernel_.specials.size();
    share_slots(&kernel_);
    if (kernel_.slots > kMostSlots) {
      unknown_.insert(kernel_.name + ": more registers and constants than the stack holds");
    }
  }

 private:
  static constexpr uint32_t kMostSlots = 24 * 1024;  // they lie on a fiber's stack

  // One register, or, as %r<10>, those from %r0 to %r9.
  struct Family {
    uint32_t first = 0, count = 0;
    bool one = false;
    uint32_t size() const { return one ? 1 : count; }
  };
  using Families = std::map<std::string, Family, std::less<>>;

  // Registers and labels are known from the brace before them to the one behind.
  struct Scope {
    Families registers;
    std::map<std::string, uint32_t, std::less<>> labels;
    std::vector<std::pair<size_t, std::string>> jumps;  // from an instruction to a label
  };

  // Jumps to what the scope does not know go to the scope around it.
  void close_scope() {
    const Scope closed = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [index, name] : closed.jumps) {
      if (const auto to = closed.labels.find(name); to != closed.labels.end()) {
        kernel_.code[index].operand[0] = to->second;
      } else if (scopes_.empty()) {
        unknown_.insert("line " + std::to_string(kernel_.code[index].line) + ": label " + name);
      } else {
        scopes_.back().jumps.push_back({index, name});
      }
    }
  }

  static bool is_shared(Text x) { return starts(x, ".shared") || starts(x, ".extern"); }
  void lay_out_shared() {
    kernel_.static_shared = aligned(shared_.bytes, shared_.open_align);
    for (const std::string& name : shared_.open) {
      shared_.addresses[name] = kSharedBase + kernel_.static_shared;
    }
    addresses_.insert(shared_.addresses.begin(), shared_.addresses.end());
  }

  // Those of a declaration, numbered from 0.
  static std::vector<std::pair<std::string, Family>> registers_of(const Piece& s) {
    Text rest = s.text;
    take_word(&rest), size_of(take_word(&rest), s.line);
    std::vector<std::pair<std::string, Family>> all;
    uint32_t first = 0;
    for (const Text name : split(rest)) {
      const size_t open = name.find('<');
      Family family{.first = first, .one = open == Text::npos};
      if (!family.one) {
        const Text count = name.substr(open);
        if (!encloses('<', count, '>')) unknown(s.line, "register " + std::string(name));
        const uint64_t n = number(inside(count), s.line);
        if (n > kMostSlots) unknown(s.line, "more registers than the stack holds");
        family.count = static_cast<uint32_t>(n);
      }
      first += family.size();
      all.push_back({std::string(name.substr(0, open)), family});
    }
    return all;
  }

  void declare(const Piece& s) {
    const uint32_t before = next_register_;
    for (auto [name, family] : registers_of(s)) {
      next_register_ += family.size();
      family.first += before;
      if (!scopes_.back().registers.emplace(name, family).second) {
        unknown(s.line, "a second register " + name);
      }
    }
  }

  // The slot of a register, or kNone.
  static constexpr uint32_t kNone = ~0u;
  uint32_t find_register(Text name) const {
    size_t digits = name.size();
    while (digits > 0 && is_digit(name[digits - 1])) --digits;
    uint32_t n = 0;
    const bool numbered =
        std::from_chars(name.data() + digits, name.data() + name.size(), n).ec == std::errc();
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const Families& known = scope->registers;
      if (const auto one = known.find(name); one != known.end() && one->second.one) {
        return one->second.first;
      }
      const auto family = numbered ? known.find(name.substr(0, digits)) : known.end();
      if (family != known.end() && n < family->second.count) return family->second.first + n;
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
      const bool wide = x[1] == 'd' || x[1] == 'D';
      if (x.size() != (wide ? 18 : 10) || wide != name_.ends_with("64")) {
        unknown(line, "number " + std::string(x) + " of " + name_);
      }
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

  // Calls f with each kind of operand and, of vectors, with how many they are.
  template <class F>
  static void each_kind(const std::string& kinds, F f) {
    for (size_t k = 0; k < kinds.size(); ++k) {
      const bool vector = k + 1 < kinds.size() && is_digit(kinds[k + 1]);
      f(kinds[k], vector ? kinds[k + 1] - '0' : 0);
      k += vector;
    }
  }

  // Whether operands are as many as a form has, and vectors, addresses and others where it has
  // them.
  static bool fit(const std::string& kinds, const std::vector<Text>& operands) {
    size_t used = 0;
    bool all = true;
    each_kind(kinds, [&](char kind, size_t count) {
      const Text x = used < operands.size() ? operands[used] : Text();
      ++used;
      if (count > 0) {
        all &= encloses('{', x, '}') && split(inside(x)).size() == count;
      } else {
        all &= !x.empty() && x.front() != '{' && encloses('[', x, ']') == (kind == 'a');
      }
    });
    return all && used == operands.size();
  }

  // Operands that fit.
  void decode(const std::string& kinds, const std::vector<Text>& operands, Instruction* i) {
    uint32_t at = 0;
    auto next = operands.begin();
    const auto number_of = [&](Text x) { i->operand[at++] = constant(number(x, i->line)); };
    const auto write = [&](Text x) { i->operand[at++] = target(x, i->line); };
    const auto read = [&](Text x) {
      i->operand[at] = source(x, i->line, at);
      ++at;
    };
    each_kind(kinds, [&](char kind, size_t) {
      const Text x = *next++;
      if (kind == 'D' || kind == 'S') {
        for (const Text part : split(inside(x))) kind == 'D' ? write(part) : read(part);
      } else if (kind == 'd') {
        write(x);
      } else if (kind == 's') {
        read(x);
      } else if (kind == 'p') {
        const size_t bar = x.find('|');
        write(trimmed(x.substr(0, bar)));
        write(bar == Text::npos ? Text("_") : trimmed(x.substr(bar + 1)));
      } else if (kind == 'a') {
        const Text sum = inside(x);
        const size_t plus = sum.find('+');
        read(trimmed(sum.substr(0, plus)));
        number_of(plus == Text::npos ? Text("0") : trimmed(sum.substr(plus + 1)));
      } else if (kind == 'i') {
        i->operand[at++] = static_cast<uint32_t>(number(x, i->line));
      } else {  // a label
        scopes_.back().jumps.push_back({kernel_.code.size(), std::string(x)});
        ++at;
      }
    });
  }

  void read(const Piece& s) {
    Text text = s.text;
    if (text == "{") {
      scopes_.emplace_back();
    } else if (text == "}") {
      close_scope();
    } else if (text.back() == ':') {
      const std::string label(text.substr(0, text.size() - 1));
      const auto here = static_cast<uint32_t>(kernel_.code.size());
      if (!scopes_.back().labels.emplace(label, here).second) {
        unknown(s.line, "a second label " + label);
      }
    } else if (starts(text, ".reg")) {
      declare(s);
    } else if (starts(text, ".pragma") || is_shared(text)) {
    } else if (starts(text, ".")) {
      unknown(s.line, "directive " + std::string(take_word(&text)));
    } else {
      read_instruction(s);
    }
  }

  void read_instruction(const Piece& s) {
    Text text = s.text;
    Instruction i{.execute = nullptr, .kinds = "", .line = s.line};
    if (starts(text, "@")) {
      Text guard = take_word(&text).substr(1);
      i.unless = starts(guard, "!");
      if (i.unless) guard.remove_prefix(1);
      i.guard = target(guard, s.line);
    }
    name_ = take_word(&text);
    const std::vector<Form>* const forms = known_forms().find(name_);
    if (forms == nullptr) throw Unknown(name_);
    auto operands = split(text);
    for (Text& x : operands) {  // Triton writes {a} for a
      if (encloses('{', x, '}') && split(inside(x)).size() == 1) x = inside(x);
    }
    for (const Form& form : *forms) {
      if (!fit(form.operands, operands)) continue;
      i.kinds = form.operands.c_str();
      decode(form.operands, operands, &i);
      i.execute = form.execute;
      kernel_.code.push_back(i);
      return;
    }
    throw Unknown(name_ + " with operands of other kinds");
  }

  Kernel& kernel_;
  SharedMemory shared_;
  Addresses addresses_;  // of parameters and shared variables
  std::set<std::string>& unknown_;
  uint32_t sink_, next_register_ = 1;
  std::vector<Scope> scopes_;
  std::map<uint64_t, uint32_t> constants_;
  std::vector<std::pair<size_t, uint32_t>> special_uses_;
  std::string name_;  // of the instruction that is read
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

// What stands between the parameters of a kernel and its body.
void read_limits(Text text, uint32_t line, Kernel* kernel) {
  while (!text.empty()) {
    const Text limit = take_word(&text);
    const Text values = text.substr(0, text.find('.'));
    text.remove_prefix(values.size());
    if (limit == ".maxntid" || limit == ".reqntid") {
      kernel->most_threads = 1;
      for (const Text n : split(values)) kernel->most_threads *= number(n, line);
      if (limit == ".reqntid") kernel->fewest_threads = kernel->most_threads;
    } else if (limit != ".minnctapersm" && limit != ".maxnreg") {
      unknown(line, "directive " + std::string(limit));
    }
  }
}

// name(parameters) limits { body }. Returns how long it is.
size_t read_kernel(Text text, uint32_t line, const SharedMemory& shared,
                   std::set<std::string>& unknowns, Kernel* kernel) {
  const size_t body = text.find('{');
  size_t end = body;
  for (int depth = 0; end < text.size();) {
    depth += (text[end] == '{') - (text[end] == '}');
    ++end;
    if (depth == 0) break;
  }
  if (body == Text::npos || text[end - 1] != '}') unknown(line, "an entry without an end");
  Text head = trimmed(text.substr(0, body));
  const size_t open = head.find('('), close = head.find(')');
  Text parameters;
  if (open < close && close != Text::npos) {
    kernel->name = trimmed(head.substr(0, open));
    parameters = head.substr(open + 1, close - open - 1);
    head = trimmed(head.substr(close + 1));
  } else {
    kernel->name = take_word(&head);
  }
  Reader reader(*kernel, shared, unknowns);
  for (const Text p : split(parameters)) reader.add_parameter(p, line);
  read_limits(head, line, kernel);
  const auto lines = static_cast<uint32_t>(std::count(text.begin(), text.begin() + body, '\n'));
  reader.read(statements(text.substr(body + 1, end - body - 2), line + lines));
  return end;
}

}  // namespace

std::vector<Kernel> read_module(Text original) {
  const std::string copy = without_comments(original);
  const Text text = copy;
  std::vector<Kernel> kernels;
  std::set<std::string> unknowns;
  SharedMemory shared;
  size_t at = 0, counted = 0;
  uint32_t line = 1;
  // Directives, one after the other: each ends with its line, a semicolon or a body in braces.
  while (at < text.size()) {
    if (is_space(text[at])) {
      ++at;
      continue;
    }
    for (; counted < at; ++counted) line += text[counted] == '\n';
    Text rest = text.substr(at);
    const Text word = take_word(&rest);
    const auto end_of = [&](const char* what) {
      return std::min(text.find(what, at), text.size());
    };
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") {
      at = end_of("\n");
    } else if (word == ".section") {
      at = end_of("}") + 1;
    } else if (word == ".extern" || word == ".shared") {
      const size_t end = end_of(";");
      shared.add({trimmed(text.substr(at, end - at)), line});
      at = end + 1;
    } else if (word == ".global") {  // a string that nothing refers to: else the operand is unknown
      at = end_of(";") + 1;
    } else if (word == ".visible" || word == ".weak") {
      at += word.size();
    } else if (word == ".entry") {
      at += word.size();
      at += read_kernel(text.substr(at), line, shared, unknowns, &kernels.emplace_back());
    } else {
      unknown(line, "directive " + std::string(word));
    }
  }
  if (!unknowns.empty()) {
    std::string all;
    for (const std::string& u : unknowns) all += (all.empty() ? "" : "\n") + u;
    throw Unknown(all);
  }
  return kernels;
}

}  // namespace ptx
