// csrc/kernels.cu on a stand-in for the CUDA runtime: threads that launch one kernel with much and with little shared
// memory on two devices never find it with less than they need. Exit code 1 and a line if one does.
#include <cstdio>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/kernels.cu"

namespace hide {
char shared_memory[1];
}

namespace {
constexpr int kDefault = 48 * 1024, kMost = 99 * 1024;
thread_local int current = 0;
std::mutex mutex;
std::map<std::pair<const void*, int>, int> limits;
int settings = 0;
}  // namespace

cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = kMost, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  limits[{function, current}] = value;
  ++settings;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t shared, cudaStream_t) {
  std::this_thread::yield();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto limit = limits.find({function, current});
  return int(shared) <= (limit == limits.end() ? kDefault : limit->second) ? cudaSuccess : cudaErrorInvalidValue;
}
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

int main() {
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int run = 0; run < 2000; ++run)
        failed += hide_launch("regions_block_float32", i / 2, 1, 32, i % 2 ? kMost : 100, nullptr, nullptr) != nullptr;
      failed += current != 0;
    });
  for (std::thread& thread : threads) thread.join();
  if (failed || settings != 2) std::printf("%d launches failed, %d settings\n", failed.load(), settings);
  return failed || settings != 2;
}
