// CUDA graphs: what a stretch of host code launches on a GPU, recorded once and launched as one.
//
// What must stay true, of the order of work on the GPU:
// - Recording runs nothing. It happens on a stream of its own, which no work is ever run on; replays go to the stream
//   that is current then, so they lie in order behind the copies that fill a graph's inputs and before whatever reads
//   its outputs. No event is needed between the two streams.
// - Graphs that share a pool reuse each other's memory. They replay one after another on one stream, and what one of
//   them gave is read, on that stream, before the next one replays.
// - Memory that a graph allocated while it was recorded is its own until it is dropped; other tensors that it touches
//   are the caller's to keep.
#include "shim.h"

#include "guard.h"

#ifdef AF_NCCL
#include <ATen/Context.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>

struct AfGraph {
  c10::DeviceIndex device = 0;
  c10::MempoolId_t pool{0, 0};
  at::cuda::CUDAGraph graph;
  // There while it is recorded: makes the recording stream current, and the one before it again at the end.
  // Guards of any device: those of CUDA alone call its runtime, which is not linked here.
  std::optional<c10::StreamGuard> recording;

  ~AfGraph() {
    if (!recording) return;
    try {
      end();
    } catch (...) {
      // Whoever began it has an error of their own.
    }
  }

  void begin() {
    try {
      // Of this thread alone: NCCL's and the learner's other threads may go on querying events and freeing memory.
      graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      stop_allocating();
      throw;
    }
  }

  void end() {
    try {
      graph.capture_end();
    } catch (...) {
      stop_allocating();
      recording.reset();
      throw;
    }
    recording.reset();
  }

 private:
  // What a beginning or an end that throws leaves undone: the allocators would ask this graph for its memory after it
  // is gone. Those that were told already say so, which is no news.
  void stop_allocating() noexcept {
    attempt([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool); });
    attempt([&] { c10::cuda::CUDACachingAllocator::releasePool(device, pool); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(pool); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->release_pool(pool); });
  }

  template <class F>
  static void attempt(F&& f) noexcept {
    try {
      f();
    } catch (...) {
    }
  }
};

namespace {

// One for good: cuBLAS keeps a workspace for every stream it has seen.
c10::cuda::CUDAStream recording_stream(c10::DeviceIndex device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = streams.find(device);
  if (found != streams.end()) return found->second;
  return streams.emplace(device, c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)).first->second;
}

}  // namespace

extern "C" {

int af_graph_begin(int device, AfGraph* beside, AfGraph** out) {
  return af::guarded([&] {
    TORCH_CHECK(device >= 0 && static_cast<size_t>(device) < at::getNumGPUs(), "there is no such GPU");
    const auto index = static_cast<c10::DeviceIndex>(device);
    {
      // What runs still is no part of the graph. An error of it shows here, and not as one of the recording.
      const c10::DeviceGuard on(c10::Device(c10::kCUDA, index));
      c10::cuda::device_synchronize();
    }
    auto graph = std::make_unique<AfGraph>();
    graph->device = index;
    graph->pool = beside ? beside->pool : at::cuda::graph_pool_handle();
    // Keeps the stream's device current, too, until the end: the end looks for the stream there.
    graph->recording.emplace(recording_stream(index).unwrap());
    try {
      graph->begin();
    } catch (...) {
      graph->recording.reset();
      throw;
    }
    *out = graph.release();
  });
}

int af_graph_end(AfGraph* graph) {
  return af::guarded([&] { graph->end(); });
}

int af_graph_replay(AfGraph* graph) {
  return af::guarded([&] { graph->graph.replay(); });
}

void af_graph_drop(AfGraph* graph) {
  af::guarded([&] { delete graph; });
}

}  // extern "C"
#else
extern "C" {

int af_graph_begin(int, AfGraph*, AfGraph**) { return af::unsupported("this program was built without CUDA"); }
int af_graph_end(AfGraph*) { return af::unsupported("this program was built without CUDA"); }
int af_graph_replay(AfGraph*) { return af::unsupported("this program was built without CUDA"); }
void af_graph_drop(AfGraph*) {}

}  // extern "C"
#endif
