// The C face of what this crate needs from libtorch and tch does not bind: c10d's stores and process
// groups, the fused AdamW kernel, copies to GPUs, CUDA graphs, and the float32 matrix-product precision.
//
// Every function that returns int gives AF_OK, or a code whose text af_last_error() holds for the calling
// thread. No C++ exception leaves this file. Tensors are `torch::Tensor*`, which is tch's `*mut C_tensor`.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  AF_OK = 0,
  AF_OTHER = 1,
  AF_TIMEOUT = 2,
  AF_NETWORK = 3,
  AF_STORE = 4,
  AF_BACKEND = 5,
  AF_UNSUPPORTED = 6,
};

typedef struct AfStore AfStore;
typedef struct AfGroup AfGroup;
typedef struct AfWork AfWork;
typedef struct AfGraph AfGraph;

const char* af_last_error(void);

int af_store_tcp(const char* host, uint16_t port, int is_server, int64_t timeout_ms, AfStore** out, uint16_t* out_port);
int af_store_prefix(AfStore* store, const char* prefix, AfStore** out);
int af_store_set(AfStore* store, const char* key, const uint8_t* data, size_t len);
int af_store_get(AfStore* store, const char* key, uint8_t** out, size_t* out_len);  // release with af_bytes_drop
int af_store_add(AfStore* store, const char* key, int64_t delta, int64_t* out);
void af_store_drop(AfStore* store);
void af_bytes_drop(uint8_t* bytes);

int af_group_gloo(AfStore* store, int rank, int size, const char* bind_host, int64_t timeout_ms, AfGroup** out);
int af_group_nccl(AfStore* store, int rank, int size, int device, int64_t timeout_ms, AfGroup** out);
void af_group_drop(AfGroup* group);

int af_all_reduce(AfGroup* group, void* tensor, int op, AfWork** out);
int af_broadcast(AfGroup* group, void* tensor, int root, AfWork** out);
int af_reduce_scatter(AfGroup* group, void* output, void* input, int op, AfWork** out);
int af_send(AfGroup* group, void* tensor, int destination, int tag, AfWork** out);
int af_recv(AfGroup* group, void* tensor, int source, int tag, AfWork** out);
int af_work_wait(AfWork* work, int64_t timeout_ms);
void af_work_drop(AfWork* work);

int af_fused_adamw(void** params, void** grads, void** exp_avgs, void** exp_avg_sqs, void** steps, size_t count,
                   double lr, double beta1, double beta2, double weight_decay, double eps, void* grad_scale);
int af_float32_matmul_precision(const char* precision);
int af_upload(void* host, int device, void** out);  // a new tensor on that GPU; the copy is under way
int af_upload_into(void* host, void* to);           // the same into a tensor of that size and kind

// Between begin and end, work that this thread gives to the GPU is recorded, not run. An end that fails leaves nothing
// to replay. `beside`: NULL, or a graph whose memory the new one may use, too.
int af_graph_begin(int device, AfGraph* beside, AfGraph** out);
int af_graph_end(AfGraph* graph);
int af_graph_replay(AfGraph* graph);  // on the current stream
void af_graph_drop(AfGraph* graph);   // ends a recording that is under way

#ifdef __cplusplus
}
#endif
