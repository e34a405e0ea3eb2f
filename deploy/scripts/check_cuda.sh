#!/usr/bin/env bash
# Compiles and links the worker for CUDA, on a machine without a GPU: `make check-cuda`. The result is not run. The
# coordinator links no libtorch and is the same program with and without CUDA.
#
#   deploy/scripts/check_cuda.sh                 always
#   deploy/scripts/check_cuda.sh --if-changed    only if what it alone can find differs from what passed last
#
# What passed is a hash in .ci/cuda-checked, to be committed with the change that it belongs to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

stamp=.ci/cuda-checked
say() { echo "check-cuda: $*" >&2; }

# What this build alone sees. All else is in the ordinary build, too, byte for byte: Rust without `feature = "nccl"` is
# the same code, and C++ without AF_NCCL is compiled against the same headers (both libtorches come out of one wheel).
# Left are the files which name that feature or macro, the headers beside them (those of ops/ are in the ordinary build),
# how they are built, and the versions of what they are built against. Hashed by content and name, tracked or new: the same on every machine.
inputs() {
    {
        git ls-files -co --exclude-standard -- ':(glob)worker/c10d/csrc/*.h' worker/c10d/build.rs .cargo/config.toml \
            deploy/scripts/check_cuda.sh deploy/scripts/fetch_libtorch_cuda.sh
        git grep --untracked -l AF_NCCL -- worker/c10d/csrc
        git grep --untracked -lE 'feature *= *"nccl"' -- '*.rs'
    } | LC_ALL=C sort -u | while IFS= read -r file; do if [ -f "$file" ]; then sha256sum -- "$file"; fi; done
    git grep --untracked -E '^nccl *=' -- '*Cargo.toml' | LC_ALL=C sort
    awk '/^name = "(tch|torch-sys|cc)"$/ { print; for (i = 0; i < 3; i++) { getline; print } }' Cargo.lock
}
hash=$(inputs | sha256sum | cut -d' ' -f1)

if [ "${1:-}" = --if-changed ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$hash" ]; then
    say "nothing that only it compiles has changed since it was compiled and linked (${hash:0:12}); not run"
    exit 0
fi

deploy/scripts/fetch_libtorch_cuda.sh
cuda=$PWD/third_party/libtorch-cuda
say "compiling and linking the worker with CUDA …"
# A folder of its own, so that nothing of the ordinary build is made again; no debug information, which is not run.
env -u LIBTORCH_INCLUDE LIBTORCH="$cuda" AGENTFLY_CUDA_INCLUDE="$cuda/cuda-include" \
    CARGO_TARGET_DIR=target/cuda CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0 \
    cargo build --locked --features agentfly-worker/nccl -p agentfly-worker

program=target/cuda/debug/worker
# The linker leaves out a library of which nothing is used; libc10_cuda.so comes with this one.
needed=$(readelf --dynamic "$program" | grep NEEDED)
if ! grep -q '\[libtorch_cuda\.so\]' <<<"$needed"; then
    say "error: $program is not linked to libtorch_cuda.so: the CUDA parts were left out"
    exit 1
fi
echo "$hash" > "$stamp"
say "compiled and linked; commit $stamp with what has changed"
