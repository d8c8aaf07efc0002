// LibTorch's stable ABI, as much of it as csrc/cpu needs, and a driver of the operators that
// csrc/cpu registers: the host code and the kernels of a processor that torch has no build for here
// run unchanged under an emulator of it.
//
// driver CASES RESULTS THREADS reads calls and writes what they return. A call is a name, then
// arguments, then the number of outputs. Python's twin is tests/test_arm.py. All numbers are of
// this machine's byte order.
//
//   text      u32 length, bytes
//   argument  u8 kind: 0 none, 1 tensor, 2 tensor that may be none, 3 int64, 4 double, 5 bool
//   tensor    i32 dtype (torch's ScalarType), i32 dimensions, i64 sizes, i64 strides, i64 bytes,
//   data result    u8: 1, then the outputs, then all tensors among the arguments; or 0 and a text
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Dtype : int32_t { u8, i8, i16, i32, i64, half, single, real, boolean = 11, brain = 15 };

size_t size_of(int32_t dtype) {
  switch (dtype) {
    case u8:
    case i8:
    case boolean:
      return 1;
    case i16:
    case half:
    case brain:
      return 2;
    case i32:
    case single:
      return 4;
    default:
      return 8;
  }
}

constexpr std::align_val_t kLine{64};
constexpr unsigned char kPoison = 0xCB;  // what new memory holds

struct Memory {
  explicit Memory(size_t size) : bytes(size), data(::operator new(size + 1, kLine)) {
    std::memset(data, kPoison, size);
  }
  Memory(const Memory&) = delete;
  ~Memory() { ::operator delete(data, kLine); }
  size_t bytes;
  void* data;
};

struct Tensor {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<Memory> memory;
  size_t offset = 0;  // bytes

  char* data() const { return static_cast<char*>(memory->data) + offset; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }
};

Tensor empty(int32_t dtype, std::vector<int64_t> sizes) {
  Tensor t{dtype, std::move(sizes), {}, nullptr};
  t.strides.resize(t.sizes.size());
  int64_t next = 1;
  for (size_t d = t.sizes.size(); d-- > 0;) {
    t.strides[d] = next;
    next *= t.sizes[d] > 0 ? t.sizes[d] : 1;
  }
  t.memory = std::make_shared<Memory>(t.numel() * size_of(dtype));
  return t;
}

bool is_contiguous(const Tensor& t) {
  int64_t next = 1;
  for (size_t d = t.sizes.size(); d-- > 0;) {
    if (t.sizes[d] != 1 && t.strides[d] != next) return t.numel() == 0;
    next *= t.sizes[d];
  }
  return true;
}

Tensor contiguous(const Tensor& t) {
  Tensor out = empty(t.dtype, t.sizes);
  const size_t size = size_of(t.dtype);
  std::vector<int64_t> at(t.sizes.size(), 0);
  for (int64_t i = 0; i < t.numel(); ++i) {
    int64_t from = 0;
    for (size_t d = 0; d < at.size(); ++d) from += at[d] * t.strides[d];
    std::memcpy(out.data() + i * size, t.data() + from * static_cast<int64_t>(size), size);
    for (size_t d = at.size(); d-- > 0 && ++at[d] == t.sizes[d];) at[d] = 0;
  }
  return out;
}

Tensor& of(AtenTensorHandle handle) { return *reinterpret_cast<Tensor*>(handle); }
AtenTensorHandle handle_of(Tensor t) {
  return reinterpret_cast<AtenTensorHandle>(new Tensor(std::move(t)));
}

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> found;
  return found;
}

uint32_t threads = 1;
thread_local bool in_parallel = false;

template <class T>
T as(StableIValue x) {
  T value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
template <class T>
StableIValue value_of(T x) {
  StableIValue value = 0;
  std::memcpy(&value, &x, sizeof x);
  return value;
}

// What is optional in a call of the dispatcher is a pointer that the callee frees.
template <class T>
T take_optional(StableIValue x, T otherwise) {
  const std::unique_ptr<StableIValue> held(as<StableIValue*>(x));
  return held ? as<T>(*held) : otherwise;
}

}  // namespace

extern "C" {

#define MSRNN_CONSTANT(name, value) \
  int32_t name() { return value; }
MSRNN_CONSTANT(aoti_torch_dtype_uint8, u8)
MSRNN_CONSTANT(aoti_torch_dtype_int8, i8)
MSRNN_CONSTANT(aoti_torch_dtype_int16, i16)
MSRNN_CONSTANT(aoti_torch_dtype_int32, i32)
MSRNN_CONSTANT(aoti_torch_dtype_int64, i64)
MSRNN_CONSTANT(aoti_torch_dtype_float16, half)
MSRNN_CONSTANT(aoti_torch_dtype_float32, single)
MSRNN_CONSTANT(aoti_torch_dtype_float64, real)
MSRNN_CONSTANT(aoti_torch_dtype_bool, boolean)
MSRNN_CONSTANT(aoti_torch_dtype_bfloat16, brain)
// The headers name these, and no operator here has them.
MSRNN_CONSTANT(aoti_torch_dtype_complex32, 8)
MSRNN_CONSTANT(aoti_torch_dtype_complex64, 9)
MSRNN_CONSTANT(aoti_torch_dtype_complex128, 10)
MSRNN_CONSTANT(aoti_torch_dtype_float8_e5m2, 23)
MSRNN_CONSTANT(aoti_torch_dtype_float8_e4m3fn, 24)
MSRNN_CONSTANT(aoti_torch_dtype_float8_e5m2fnuz, 25)
MSRNN_CONSTANT(aoti_torch_dtype_float8_e4m3fnuz, 26)
MSRNN_CONSTANT(aoti_torch_dtype_uint16, 27)
MSRNN_CONSTANT(aoti_torch_dtype_uint32, 28)
MSRNN_CONSTANT(aoti_torch_dtype_uint64, 29)
MSRNN_CONSTANT(torch_dtype_float8_e8m0fnu, 44)
MSRNN_CONSTANT(torch_dtype_float4_e2m1fn_x2, 45)
MSRNN_CONSTANT(aoti_torch_layout_strided, 0)
MSRNN_CONSTANT(aoti_torch_layout_sparse_coo, 1)
MSRNN_CONSTANT(aoti_torch_layout_sparse_csr, 2)
MSRNN_CONSTANT(aoti_torch_layout__mkldnn, 3)
MSRNN_CONSTANT(aoti_torch_layout_sparse_csc, 4)
MSRNN_CONSTANT(aoti_torch_layout_sparse_bsr, 5)
MSRNN_CONSTANT(aoti_torch_layout_sparse_bsc, 6)
MSRNN_CONSTANT(aoti_torch_layout_jagged, 7)
MSRNN_CONSTANT(aoti_torch_memory_format_contiguous_format, 0)
MSRNN_CONSTANT(aoti_torch_memory_format_channels_last, 2)
MSRNN_CONSTANT(aoti_torch_memory_format_channels_last_3d, 3)
MSRNN_CONSTANT(aoti_torch_memory_format_preserve_format, 1)
MSRNN_CONSTANT(aoti_torch_device_type_cpu, 0)
MSRNN_CONSTANT(aoti_torch_device_type_cuda, 1)
MSRNN_CONSTANT(aoti_torch_device_type_xpu, 12)
MSRNN_CONSTANT(aoti_torch_device_type_mps, 13)
MSRNN_CONSTANT(aoti_torch_device_type_meta, 14)
MSRNN_CONSTANT(aoti_torch_device_type_privateuse1, 20)
#undef MSRNN_CONSTANT

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }
size_t aoti_torch_dtype_element_size(int32_t dtype) { return size_of(dtype); }

AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle* out) {
  *out = handle_of(of(t));
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete &of(t);
  return 0;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** out) {
  *out = of(t).data();
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* out) {
  *out = static_cast<int64_t>(of(t).sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* out) {
  *out = of(t).dtype;
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* out) {
  *out = of(t).numel();
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* out) {
  *out = of(t).sizes.at(d < 0 ? d + of(t).sizes.size() : d);
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** out) {
  *out = of(t).sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* out) {
  *out = of(t).strides.at(d < 0 ? d + of(t).strides.size() : d);
  return 0;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** out) {
  *out = of(t).strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_layout(AtenTensorHandle, int32_t* out) { return *out = 0; }
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* out) { return *out = 0; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = -1;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* out) {
  *out = is_contiguous(of(t));
  return 0;
}

AOTITorchError aoti_torch_aten_new_empty(AtenTensorHandle self, const int64_t* size, int64_t dims,
                                         int32_t* dtype, int32_t*, int32_t*, int32_t, int32_t*,
                                         AtenTensorHandle* out) {
  *out = handle_of(empty(dtype ? *dtype : of(self).dtype, {size, size + dims}));
  return 0;
}
AOTITorchError aoti_torch_aten_fill__Scalar(AtenTensorHandle self, double value) {
  const Tensor& t = of(self);
  if (t.dtype != i64 || !is_contiguous(t)) return 1;
  auto* data = reinterpret_cast<int64_t*>(t.data());
  std::fill_n(data, t.numel(), static_cast<int64_t>(value));
  return 0;
}
AOTITorchError aoti_torch_aten_narrow(AtenTensorHandle self, int64_t d, int64_t start,
                                      int64_t length, AtenTensorHandle* out) {
  Tensor t = of(self);
  t.offset += start * t.strides.at(d) * size_of(t.dtype);
  t.sizes[d] = length;
  *out = handle_of(std::move(t));
  return 0;
}

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* out) {
  auto* list = new std::vector<StableIValue>();
  list->reserve(size);
  *out = reinterpret_cast<StableListHandle>(list);
  return 0;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue x) {
  reinterpret_cast<std::vector<StableIValue>*>(list)->push_back(x);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<std::vector<StableIValue>*>(list);
  return 0;
}

AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  const std::unique_ptr<Tensor> self(&of(as<AtenTensorHandle>(stack[0])));
  const std::string op = name;
  if (op == "aten::contiguous") {
    stack[0] = value_of(handle_of(is_contiguous(*self) ? *self : contiguous(*self)));
    return 0;
  }
  if (op != "aten::new_empty" && op != "aten::new_zeros") return 1;
  auto* sizes = as<std::vector<StableIValue>*>(stack[1]);
  std::vector<int64_t> shape;
  for (StableIValue x : *sizes) shape.push_back(as<int64_t>(x));
  delete sizes;
  Tensor out = empty(take_optional<int32_t>(stack[2], self->dtype), std::move(shape));
  for (int i = 3; i < 6; ++i) take_optional<int64_t>(stack[i], 0);
  if (op == "aten::new_zeros") std::memset(out.data(), 0, out.memory->bytes);
  stack[0] = value_of(handle_of(std::move(out)));
  return 0;
}

AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t,
                                           TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t,
                                                TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Kernel kernel, uint64_t) {
  kernels()[name] = kernel;
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = threads;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f,
                                  void* context) {
  const int64_t count = end - begin;
  if (count <= 0) return 0;
  const int64_t wanted = std::min<int64_t>(threads, (count + grain - 1) / grain);
  if (in_parallel || wanted < 2) {
    f(begin, end, context);
    return 0;
  }
  const int64_t part = (count + wanted - 1) / wanted;
  std::vector<std::thread> others;
  for (int64_t first = begin; first < end; first += part) {
    others.emplace_back([=] {
      in_parallel = true;
      f(first, std::min(first + part, end), context);
    });
  }
  for (std::thread& other : others) other.join();
  return 0;
}

}  // extern "C"

namespace {

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (!file_) throw std::runtime_error(std::string("no such file: ") + path);
  }
  ~File() { std::fclose(file_); }

  bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, file_) == bytes; }
  void write(const void* from, size_t bytes) {
    if (std::fwrite(from, 1, bytes, file_) != bytes) throw std::runtime_error("cannot write");
  }

  template <class T>
  T get() {
    T value;
    if (!read(&value, sizeof value)) throw std::runtime_error("the cases end too early");
    return value;
  }
  template <class T>
  void put(T value) {
    write(&value, sizeof value);
  }

  Tensor get_tensor() {
    Tensor t{get<int32_t>(), {}, {}, nullptr};
    const auto dims = get<int32_t>();
    for (int d = 0; d < dims; ++d) t.sizes.push_back(get<int64_t>());
    for (int d = 0; d < dims; ++d) t.strides.push_back(get<int64_t>());
    t.memory = std::make_shared<Memory>(get<int64_t>());
    if (!read(t.data(), t.memory->bytes)) throw std::runtime_error("the cases end too early");
    return t;
  }
  void put_tensor(const Tensor& x) {
    const Tensor t = contiguous(x);
    put(t.dtype);
    put(static_cast<int32_t>(t.sizes.size()));
    for (int64_t size : t.sizes) put(size);
    put(static_cast<int64_t>(t.memory->bytes));
    write(t.data(), t.memory->bytes);
  }

 private:
  FILE* file_;
};

void run(File& cases, File& results, uint32_t length) {
  std::string name(length, 0);
  if (!cases.read(name.data(), length)) throw std::runtime_error("the cases end too early");
  const auto count = cases.get<uint32_t>();
  std::vector<StableIValue> stack(std::max<uint32_t>(count, 8));
  std::vector<Tensor> given;
  for (uint32_t i = 0; i < count; ++i) {
    switch (cases.get<uint8_t>()) {
      case 0:
        break;
      case 1:
        given.push_back(cases.get_tensor());
        stack[i] = value_of(handle_of(given.back()));
        break;
      case 2:
        given.push_back(cases.get_tensor());
        stack[i] = value_of(new StableIValue(value_of(handle_of(given.back()))));
        break;
      case 3:
        stack[i] = value_of(cases.get<int64_t>());
        break;
      case 4:
        stack[i] = value_of(cases.get<double>());
        break;
      default:
        stack[i] = value_of(cases.get<uint8_t>() != 0);
    }
  }
  const auto outputs = cases.get<uint32_t>();
  try {
    kernels().at(name)(stack.data(), count, outputs);
  } catch (const std::exception& error) {
    const std::string words = error.what();
    results.put<uint8_t>(0);
    results.put(static_cast<uint32_t>(words.size()));
    results.write(words.data(), words.size());
    return;
  }
  results.put<uint8_t>(1);
  for (uint32_t i = 0; i < outputs; ++i) {
    const std::unique_ptr<Tensor> out(&of(as<AtenTensorHandle>(stack[i])));
    results.put_tensor(*out);
  }
  for (const Tensor& t : given) results.put_tensor(t);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return 2;
  threads = static_cast<uint32_t>(std::atoi(words[3]));
  File cases(words[1], "rb"), results(words[2], "wb");
  uint32_t length;
  while (cases.read(&length, sizeof length)) run(cases, results, length);
  return 0;
}
