// The extension: one operator that launches any kernel, on the host or, where built with HIDE_CUDA, on the device.
// PyTorch's stable ABI and Python's limited API only, so that one build serves many versions of both.
//
// A kernel takes its tensors first, then its integers, then its reals, eight bytes each. Geometry, workspaces and shapes
// are the callers' (hide_kernels/native.py), so that every launcher runs the same plan.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "collage.h"
#include "layout.h"
#include "pixel_values.h"
#include "regions.h"

#ifdef HIDE_CUDA
extern "C" const char* hide_launch(const char* name, int device, int blocks, int threads, int shared, void** arguments,
                                   void* stream);
#endif

namespace {

using hide::SerialBlock;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Reals = std::vector<double>;

struct Geometry {
  int blocks, threads, shared;
};

// Hands out a kernel's arguments in the order of its parameters.
struct Arguments {
  const Tensors& tensors;
  const Integers& integers;
  const Reals& reals;
  size_t tensor = 0, integer = 0, real = 0;

  template <class T>
  T next() {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(tensors.at(tensor++).data_ptr());
    } else if constexpr (std::is_floating_point_v<T>) {
      return reals.at(real++);
    } else {
      return integers.at(integer++);
    }
  }
};

template <class... P>
void run(void (*body)(SerialBlock&, P...), const Geometry& geometry, Arguments arguments) {
  // Braces, not parentheses: they are evaluated from left to right.
  const std::tuple<P...> values{arguments.next<P>()...};
  std::vector<hide::u64> shared(geometry.shared / sizeof(hide::u64) + 1);
  for (int block = 0; block < geometry.blocks; ++block) {
    SerialBlock serial{block, geometry.blocks, reinterpret_cast<char*>(shared.data())};
    std::apply([&](P... value) { body(serial, value...); }, values);
  }
}

void launch_on_host(const std::string& name, const Geometry& geometry, Arguments arguments) {
  const auto go = [&](auto* body) { run(body, geometry, arguments); };
  if (name == "regions_block_float32") return go(&hide::regions_block<SerialBlock, float>);
  if (name == "regions_block_float64") return go(&hide::regions_block<SerialBlock, double>);
  if (name == "regions_step_float32") return go(&hide::regions_step<SerialBlock, float>);
  if (name == "regions_step_float64") return go(&hide::regions_step<SerialBlock, double>);
  if (name == "regions_finish") return go(&hide::regions_finish<SerialBlock>);
  if (name == "layout_boxes_int32") return go(&hide::layout_boxes<SerialBlock, int>);
  if (name == "layout_boxes_int64") return go(&hide::layout_boxes<SerialBlock, hide::i64>);
  if (name == "collage_rows") return go(&hide::collage_rows<SerialBlock>);
  if (name == "resize") return go(&hide::resize<SerialBlock>);
  if (name == "resize_to_patches_16") return go(&hide::resize_to_patches<SerialBlock, unsigned short>);
  if (name == "resize_to_patches_32") return go(&hide::resize_to_patches<SerialBlock, unsigned>);
  throw std::invalid_argument("no kernel is called " + name);
}

void launch_cpu(std::string name, Tensors tensors, Integers integers, Reals reals, int64_t blocks, int64_t,
                int64_t shared, int64_t) {
  launch_on_host(name, {int(blocks), 1, int(shared)}, {tensors, integers, reals});
}

#ifdef HIDE_CUDA
void launch_cuda(std::string name, Tensors tensors, Integers integers, Reals reals, int64_t blocks, int64_t threads,
                 int64_t shared, int64_t stream) {
  std::vector<void*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(tensor.data_ptr());
  std::vector<void*> arguments;
  for (void*& pointer : pointers) arguments.push_back(&pointer);
  for (int64_t& integer : integers) arguments.push_back(&integer);
  for (double& real : reals) arguments.push_back(&real);
  const char* error = hide_launch(name.c_str(), tensors.at(0).get_device(), int(blocks), int(threads), int(shared),
                                  arguments.data(), reinterpret_cast<void*>(stream));
  if (error != nullptr) throw std::runtime_error(name + ": " + error);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(hide_kernels_csrc, library) {
  library.def(
      "launch(str kernel, Tensor(a!)[] tensors, int[] integers, float[] reals, int blocks, int threads, int shared, "
      "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hide_kernels_csrc, CPU, library) { library.impl("launch", TORCH_BOX(&launch_cpu)); }

#ifdef HIDE_CUDA
STABLE_TORCH_LIBRARY_IMPL(hide_kernels_csrc, CUDA, library) { library.impl("launch", TORCH_BOX(&launch_cuda)); }
#endif

// Importing the module registers the operator; `cuda` says whether the kernels for the device are in it.
PyMODINIT_FUNC PyInit__csrc() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_csrc", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef HIDE_CUDA
  const int cuda = 1;
#else
  const int cuda = 0;
#endif
  if (module != nullptr && PyModule_AddIntConstant(module, "cuda", cuda) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
