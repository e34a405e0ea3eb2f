#!/usr/bin/env bash
# Puts a CPU libtorch 2.11.0 into third_party/libtorch (or DEST): 500 MB out of three Python wheels, no Python
# package installed. Run again, it does nothing. Interrupted, it leaves nothing: it builds beside DEST and
# renames last. A libtorch you already have is used instead when LIBTORCH names it (include/ and lib/ inside).
#
#   deploy/scripts/fetch_libtorch.sh [DEST]
set -euo pipefail

version=2.11.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dest=${1:-$root/third_party/libtorch}

say() { echo "fetch_libtorch: $*" >&2; }
die() { say "error: $*"; exit 1; }

if [ -n "${LIBTORCH:-}" ] && { [ -L "$dest" ] || [ "$(realpath -m "$LIBTORCH")" != "$(realpath -m "$dest")" ]; }; then
    for needed in lib/libtorch_cpu.so lib/libc10.so include/torch; do
        [ -e "$LIBTORCH/$needed" ] || die "LIBTORCH=$LIBTORCH holds no $needed; name a full libtorch $version, or unset LIBTORCH to fetch one"
    done
    # Programs look for libtorch here at run time, so this must lead to the one they are built with.
    if [ -L "$dest" ] || [ ! -e "$dest" ]; then
        mkdir -p "$(dirname "$dest")"
        ln -sfn "$(realpath "$LIBTORCH")" "$dest"
    else
        die "$dest holds a fetched libtorch, which programs would load instead of LIBTORCH=$LIBTORCH; remove it first"
    fi
    say "using LIBTORCH=$LIBTORCH (linked from $dest); nothing fetched"
    exit 0
fi
[ -L "$dest" ] && rm "$dest" # LIBTORCH is no longer set: fetch one
if [ "$(cat "$dest/build-version" 2>/dev/null || true)" = "$version" ]; then
    exit 0
fi
[ "$(uname -sm)" = "Linux x86_64" ] || die "wheels are known for Linux x86_64 only, this is $(uname -sm); set LIBTORCH to a libtorch $version of your own"
command -v python3 >/dev/null || die "python3 is needed to fetch the wheels (apt-get install python3-pip), or set LIBTORCH to a libtorch $version"
python3 -m pip --version >/dev/null 2>&1 || die "pip is needed to fetch the wheels (apt-get install python3-pip), or set LIBTORCH to a libtorch $version"

mkdir -p "$(dirname "$dest")"
# One fetch at a time: the second waits, then finds the first one's work.
exec 9>"$dest.lock"
flock -w 900 9 || die "another fetch has held $dest.lock for 15 minutes"
if [ "$(cat "$dest/build-version" 2>/dev/null || true)" = "$version" ]; then
    exit 0
fi
tmp=$(mktemp -d "$dest.partial.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The wheels' own platform tags differ: anything from glibc 2.17 to 2.28 runs here.
platforms=(--platform manylinux2014_x86_64)
for minor in $(seq 17 28); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done

fetch() {
    python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
        "${platforms[@]}" --dest "$tmp/wheels" "$@" \
        || die "could not download $*: see pip's message above; without a network, set LIBTORCH to a libtorch $version"
}
say "downloading torch $version (530 MB) …"
fetch "torch==$version"
# libtorch_cpu.so is linked to these two, whether or not a GPU is there.
fetch nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85

say "unpacking what the CPU needs …"
python3 - "$tmp" <<'PY'
import glob, sys, zipfile

target = sys.argv[1]
keep = (
    "torch/include/",
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcupti.so.13",
)
for path in glob.glob(target + "/wheels/*.whl"):
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(keep)])
PY

built=$tmp/libtorch
mkdir "$built"
mv "$tmp/torch/include" "$tmp/torch/lib" "$built/"
mv "$tmp"/nvidia/cu13/lib/*.so.13 "$built/lib/"
# The wheel's libtorch.so only pulls in the CUDA libraries; a linker script that stands for libtorch_cpu.so does.
echo 'INPUT(libtorch_cpu.so)' > "$built/lib/libtorch.so"
for needed in libtorch_cpu.so libc10.so libgomp.so.1 libcudart.so.13 libcupti.so.13; do
    [ -f "$built/lib/$needed" ] || die "the wheels hold no $needed: not the ones this script knows"
done
echo "$version" > "$built/build-version"
rm -rf "$dest"
mv "$built" "$dest"
say "ready: $dest"
