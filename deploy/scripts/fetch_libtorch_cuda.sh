#!/usr/bin/env bash
# Puts what a CUDA build compiles and links against into third_party/libtorch-cuda (or DEST): torch 2.11.0's headers and
# libraries and NVIDIA's headers, out of Python wheels (2 GB to download, 1 GB kept). None of it needs a GPU, and none
# of NVIDIA's libraries is kept: programs are linked here, not run. Run again, it does nothing. Interrupted, it leaves
# nothing: it builds beside DEST and renames last.
#
#   deploy/scripts/fetch_libtorch_cuda.sh [DEST]
#
# With LIBTORCH_CUDA=…/site-packages/torch of a full `pip install torch==2.11.0` that one is used, and only the two
# small header packages that torch does not bring are downloaded.
set -euo pipefail

version=2.11.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dest=${1:-$root/third_party/libtorch-cuda}
# What torch's own headers include, in the versions torch is built with; and what those include in turn.
header_packages=(nvidia-cuda-runtime==13.0.96 nvidia-cublas==13.1.0.3 nvidia-cusolver==12.0.4.66
    nvidia-cusparse==12.6.3.3 nvidia-nccl-cu13==2.28.9)
further_header_packages=(nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85)
libraries=(libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so libgomp.so.1)

say() { echo "fetch_libtorch_cuda: $*" >&2; }
die() { say "error: $*"; exit 1; }

# Whether DEST is what is asked for: of this version, whole, and made from LIBTORCH_CUDA if that is set.
is_there() {
    [ "$(cat "$dest/build-version" 2>/dev/null || true)" = "$version" ] && [ -e "$dest/lib/libtorch_cuda.so" ] \
        && { [ -z "${LIBTORCH_CUDA:-}" ] || [ "$(cat "$dest/made-from" 2>/dev/null || true)" = "$LIBTORCH_CUDA" ]; }
}
if is_there; then exit 0; fi
[ "$(uname -sm)" = "Linux x86_64" ] || die "wheels are known for Linux x86_64 only, this is $(uname -sm)"
python3 -m pip --version >/dev/null 2>&1 || die "python3 with pip is needed to fetch the wheels (apt-get install python3-pip)"

mkdir -p "$(dirname "$dest")"
# One fetch at a time: the second waits, then finds the first one's work.
exec 9>"$dest.lock"
flock -w 1800 9 || die "another fetch has held $dest.lock for 30 minutes"
if is_there; then exit 0; fi
tmp=$(mktemp -d "$dest.partial.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
built=$tmp/built
mkdir -p "$built/lib" "$built/cuda-include"

# The wheels' own platform tags differ: anything from glibc 2.17 to 2.28.
platforms=(--platform manylinux2014_x86_64)
for minor in $(seq 17 28); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done

# Downloads one wheel, takes what it holds of the folders named after it, and drops the rest: never more than one
# wheel on the disk.
take() {
    local package=$1
    shift
    python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
        "${platforms[@]}" --dest "$tmp/wheel" "$package" \
        || die "could not download $package: see pip's message above; without a network, set LIBTORCH_CUDA to a full torch $version"
    python3 - "$tmp/wheel" "$tmp/out" "$@" <<'PY'
import glob, sys, zipfile

wheels, target, *keep = sys.argv[1:]
for path in glob.glob(wheels + "/*.whl"):
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(tuple(keep))])
PY
    rm -rf "$tmp/wheel"
}

# NVIDIA's headers lie in one folder for all packages of a CUDA version, and in one of its own for NCCL.
merge_headers() {
    local from
    for from in "$1/cu13/include" "$1/nccl/include"; do
        if [ -d "$from" ]; then cp -rL "$from/." "$built/cuda-include/"; fi
    done
}

if [ -n "${LIBTORCH_CUDA:-}" ]; then
    [ -e "$LIBTORCH_CUDA/lib/libtorch_cuda.so" ] || die "LIBTORCH_CUDA=$LIBTORCH_CUDA holds no lib/libtorch_cuda.so: name the torch folder of a full pip install torch==$version, or unset it to fetch one"
    say "using $LIBTORCH_CUDA"
    ln -s "$(realpath "$LIBTORCH_CUDA")/include" "$built/include"
    for library in "${libraries[@]}"; do ln -s "$(realpath "$LIBTORCH_CUDA")/lib/$library" "$built/lib/$library"; done
    merge_headers "$LIBTORCH_CUDA/../nvidia"
else
    say "downloading torch $version (530 MB) …"
    take "torch==$version" torch/include/ "${libraries[@]/#/torch/lib/}"
    mv "$tmp/out/torch/include" "$built/include"
    mv "$tmp"/out/torch/lib/* "$built/lib/"
    for package in "${header_packages[@]}"; do
        say "downloading $package for its headers …"
        take "$package" nvidia/cu13/include/ nvidia/nccl/include/
    done
    merge_headers "$tmp/out/nvidia"
fi
rm -rf "$tmp/out"
for package in "${further_header_packages[@]}"; do
    say "downloading $package …"
    take "$package" nvidia/cu13/include/
done
merge_headers "$tmp/out/nvidia"

for needed in include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp "${libraries[@]/#/lib/}" \
    cuda-include/{cuda_runtime.h,cublas_v2.h,cusolverDn.h,cusparse.h,nccl.h,crt/host_config.h,nv/target}; do
    [ -e "$built/$needed" ] || die "the wheels hold no $needed: not the ones this script knows"
done
echo "$version" > "$built/build-version"
echo "${LIBTORCH_CUDA:-wheels}" > "$built/made-from"
rm -rf "$dest"
mv "$built" "$dest"
say "ready: $dest"
