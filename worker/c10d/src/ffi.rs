//! The shim's functions as `csrc/shim.h` declares them, and nothing else. Used only within this crate.
//!
//! Codes and enum numbers here and there must stay equal.

use std::ffi::{c_char, c_int, c_void};

/// Opaque: a c10d store.
pub(crate) enum RawStore {}
/// Opaque: a c10d backend (process group).
pub(crate) enum RawGroup {}
/// Opaque: a collective under way.
pub(crate) enum RawWork {}
/// Opaque: a CUDA graph, recorded or under way.
pub(crate) enum RawGraph {}

unsafe extern "C" {
    pub(crate) fn af_last_error() -> *const c_char;

    pub(crate) fn af_store_tcp(
        host: *const c_char,
        port: u16,
        is_server: c_int,
        timeout_ms: i64,
        out: *mut *mut RawStore,
        out_port: *mut u16,
    ) -> c_int;
    pub(crate) fn af_store_prefix(
        store: *mut RawStore,
        prefix: *const c_char,
        out: *mut *mut RawStore,
    ) -> c_int;
    pub(crate) fn af_store_set(
        store: *mut RawStore,
        key: *const c_char,
        data: *const u8,
        len: usize,
    ) -> c_int;
    pub(crate) fn af_store_get(
        store: *mut RawStore,
        key: *const c_char,
        out: *mut *mut u8,
        out_len: *mut usize,
    ) -> c_int;
    pub(crate) fn af_store_add(store: *mut RawStore, key: *const c_char, delta: i64, out: *mut i64) -> c_int;
    pub(crate) fn af_store_drop(store: *mut RawStore);
    pub(crate) fn af_bytes_drop(bytes: *mut u8);

    pub(crate) fn af_group_gloo(
        store: *mut RawStore,
        rank: c_int,
        size: c_int,
        bind_host: *const c_char,
        timeout_ms: i64,
        out: *mut *mut RawGroup,
    ) -> c_int;
    pub(crate) fn af_group_nccl(
        store: *mut RawStore,
        rank: c_int,
        size: c_int,
        device: c_int,
        timeout_ms: i64,
        out: *mut *mut RawGroup,
    ) -> c_int;
    pub(crate) fn af_group_drop(group: *mut RawGroup);

    pub(crate) fn af_all_reduce(
        group: *mut RawGroup,
        tensor: *mut c_void,
        op: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    pub(crate) fn af_broadcast(
        group: *mut RawGroup,
        tensor: *mut c_void,
        root: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    pub(crate) fn af_reduce_scatter(
        group: *mut RawGroup,
        output: *mut c_void,
        input: *mut c_void,
        op: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    pub(crate) fn af_send(
        group: *mut RawGroup,
        tensor: *mut c_void,
        destination: c_int,
        tag: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    pub(crate) fn af_recv(
        group: *mut RawGroup,
        tensor: *mut c_void,
        source: c_int,
        tag: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    pub(crate) fn af_work_wait(work: *mut RawWork, timeout_ms: i64) -> c_int;
    pub(crate) fn af_work_drop(work: *mut RawWork);

    pub(crate) fn af_fused_adamw(
        params: *const *mut c_void,
        grads: *const *mut c_void,
        exp_avgs: *const *mut c_void,
        exp_avg_sqs: *const *mut c_void,
        steps: *const *mut c_void,
        count: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: *mut c_void,
    ) -> c_int;
    pub(crate) fn af_float32_matmul_precision(precision: *const c_char) -> c_int;
    pub(crate) fn af_upload(host: *mut c_void, device: c_int, out: *mut *mut c_void) -> c_int;
    pub(crate) fn af_upload_into(host: *mut c_void, to: *mut c_void) -> c_int;

    pub(crate) fn af_graph_begin(device: c_int, beside: *mut RawGraph, out: *mut *mut RawGraph) -> c_int;
    pub(crate) fn af_graph_end(graph: *mut RawGraph) -> c_int;
    pub(crate) fn af_graph_replay(graph: *mut RawGraph) -> c_int;
    pub(crate) fn af_graph_drop(graph: *mut RawGraph);
}
