#include "shim.h"

#include "guard.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <vector>
#ifdef AF_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

using std::chrono::milliseconds;

struct AfStore {
  c10::intrusive_ptr<c10d::Store> store;
};
struct AfGroup {
  c10::intrusive_ptr<c10d::Backend> backend;
};
struct AfWork {
  c10::intrusive_ptr<c10d::Work> work;
};

namespace {

thread_local std::string last_error;

bool contains_any(const std::string& text, std::initializer_list<const char*> needles) {
  return std::any_of(needles.begin(), needles.end(),
                     [&](const char* needle) { return text.find(needle) != std::string::npos; });
}

// c10d's exception types do not tell a late peer from a dead one; its texts do.
int classify(const std::string& text, int otherwise) {
  if (contains_any(text, {"imed out", "imeout"})) return AF_TIMEOUT;
  if (contains_any(text, {"onnection closed", "onnection reset", "roken pipe", "onnection refused"})) return AF_NETWORK;
  return otherwise;
}

}  // namespace

int af::fail(const std::string& text, int otherwise) {
  last_error = text;
  return classify(text, otherwise);
}

int af::unsupported(const std::string& text) {
  last_error = text;
  return AF_UNSUPPORTED;
}

namespace {

using af::guarded;

at::Tensor& as_tensor(void* tensor) { return *reinterpret_cast<at::Tensor*>(tensor); }

c10d::ReduceOp as_reduce_op(int op) {
  switch (op) {
    case 0: return c10d::ReduceOp::SUM;
    case 1: return c10d::ReduceOp::MAX;
    default: TORCH_CHECK(false, "no reduce operation has the number ", op);
  }
}

std::vector<at::Tensor> as_tensors(void** tensors, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; i++) list.push_back(as_tensor(tensors[i]));
  return list;
}

// Counts a change in place, as libtorch's operators do by themselves and what writes past them does not: a linear map
// would go on with the weights it has packed.
const at::Tensor& changed(const at::Tensor& tensor) {
  tensor.unsafeGetTensorImpl()->bump_version();
  return tensor;
}

template <class F>
int submit(AfWork** out, F&& start) noexcept {
  return guarded([&] { *out = new AfWork{start()}; });
}

}  // namespace

extern "C" {

const char* af_last_error(void) { return last_error.c_str(); }

int af_store_tcp(const char* host, uint16_t port, int is_server, int64_t timeout_ms, AfStore** out, uint16_t* out_port) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server != 0;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    auto store = c10::make_intrusive<c10d::TCPStore>(std::string(host), options);
    *out_port = store->getPort();
    *out = new AfStore{store};
  });
}

int af_store_prefix(AfStore* store, const char* prefix, AfStore** out) {
  return guarded([&] { *out = new AfStore{c10::make_intrusive<c10d::PrefixStore>(prefix, store->store)}; });
}

int af_store_set(AfStore* store, const char* key, const uint8_t* data, size_t len) {
  return guarded([&] { store->store->set(std::string(key), std::vector<uint8_t>(data, data + len)); });
}

int af_store_get(AfStore* store, const char* key, uint8_t** out, size_t* out_len) {
  return guarded([&] {
    auto value = store->store->get(std::string(key));
    auto* bytes = new uint8_t[value.size() + 1];
    std::copy(value.begin(), value.end(), bytes);
    *out_len = value.size();
    *out = bytes;
  });
}

int af_store_add(AfStore* store, const char* key, int64_t delta, int64_t* out) {
  return guarded([&] { *out = store->store->add(key, delta); });
}

void af_store_drop(AfStore* store) {
  guarded([&] { delete store; });
}

void af_bytes_drop(uint8_t* bytes) { delete[] bytes; }

int af_group_gloo(AfStore* store, int rank, int size, const char* bind_host, int64_t timeout_ms, AfGroup** out) {
  return guarded([&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->threads = 1;  // collectives are awaited one by one: more threads would idle
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(bind_host));
    *out = new AfGroup{c10::make_intrusive<c10d::ProcessGroupGloo>(store->store, rank, size, options)};
  });
}

#ifdef AF_NCCL
int af_group_nccl(AfStore* store, int rank, int size, int device, int64_t timeout_ms, AfGroup** out) {
  return guarded([&] {
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store->store, rank, size, options);
    const at::Device bound(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    backend->setBoundDeviceId(bound);
    backend->eagerConnectSingleDevice(bound);
    *out = new AfGroup{backend};
  });
}
#else
int af_group_nccl(AfStore*, int, int, int, int64_t, AfGroup**) {
  return af::unsupported("this program was built without NCCL");
}
#endif

void af_group_drop(AfGroup* group) {
  guarded([&] { delete group; });
}

int af_all_reduce(AfGroup* group, void* tensor, int op, AfWork** out) {
  return submit(out, [&] {
    std::vector<at::Tensor> tensors{changed(as_tensor(tensor))};
    c10d::AllreduceOptions options;
    options.reduceOp = as_reduce_op(op);
    return group->backend->allreduce(tensors, options);
  });
}

int af_broadcast(AfGroup* group, void* tensor, int root, AfWork** out) {
  return submit(out, [&] {
    std::vector<at::Tensor> tensors{changed(as_tensor(tensor))};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return group->backend->broadcast(tensors, options);
  });
}

int af_reduce_scatter(AfGroup* group, void* output, void* input, int op, AfWork** out) {
  return submit(out, [&] {
    c10d::ReduceScatterOptions options;
    options.reduceOp = as_reduce_op(op);
    changed(as_tensor(output));
    return group->backend->_reduce_scatter_base(as_tensor(output), as_tensor(input), options);
  });
}

int af_send(AfGroup* group, void* tensor, int destination, int tag, AfWork** out) {
  return submit(out, [&] {
    std::vector<at::Tensor> tensors{as_tensor(tensor)};
    return group->backend->send(tensors, destination, tag);
  });
}

int af_recv(AfGroup* group, void* tensor, int source, int tag, AfWork** out) {
  return submit(out, [&] {
    std::vector<at::Tensor> tensors{changed(as_tensor(tensor))};
    return group->backend->recv(tensors, source, tag);
  });
}

int af_work_wait(AfWork* work, int64_t timeout_ms) {
  return guarded([&] { TORCH_CHECK(work->work->wait(milliseconds(timeout_ms)), "the collective was aborted"); });
}

void af_work_drop(AfWork* work) {
  guarded([&] { delete work; });
}

int af_fused_adamw(void** params, void** grads, void** exp_avgs, void** exp_avg_sqs, void** steps, size_t count,
                   double lr, double beta1, double beta2, double weight_decay, double eps, void* grad_scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::optional<at::Tensor> scale;
    if (grad_scale != nullptr) scale = as_tensor(grad_scale);
    auto p = as_tensors(params, count);
    auto g = as_tensors(grads, count);
    auto m = as_tensors(exp_avgs, count);
    auto v = as_tensors(exp_avg_sqs, count);
    auto s = as_tensors(steps, count);
    at::_fused_adamw_(p, g, m, v, {}, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                       scale);
    for (const auto* list : {&p, &m, &v})
      for (const auto& tensor : *list) changed(tensor);
  });
}

int af_float32_matmul_precision(const char* precision) {
  return guarded([&] { at::globalContext().setFloat32MatmulPrecision(std::string(precision)); });
}

// libtorch keeps pinned memory until the copy out of it has been made.
int af_upload(void* host, int device, void** out) {
  return guarded([&] {
    const at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    TORCH_CHECK(static_cast<size_t>(device) < at::getNumGPUs(), "there is no such GPU");
    const at::Tensor& from = as_tensor(host);
    *out = new at::Tensor(from.numel() == 0 ? at::empty_like(from, gpu) : from.pin_memory().to(gpu, /*non_blocking=*/true));
  });
}

int af_upload_into(void* host, void* to) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const at::Tensor &from = as_tensor(host), &tensor = as_tensor(to);
    if (from.numel() != 0) tensor.copy_(tensor.is_cpu() ? from : from.pin_memory(), /*non_blocking=*/true);
  });
}

}  // extern "C"
