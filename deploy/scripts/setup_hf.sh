#!/bin/sh
# Says on stdout which Python has torch and transformers as `make parity` compares with them, and makes
# third_party/hf-venv from deploy/requirements-hf.txt where none has (4.7 GB, minutes, once).
# Safe to run again: it does nothing while the stamp names this Python and these requirements, and starts over otherwise.
# Of two at a time the second waits for the first.
# HF_PYTHON names an interpreter that has both already; it is checked, and nothing is installed.
# PYTHON names the interpreter to build the environment with (default python3; at least 3.11).
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
venv=$root/third_party/hf-venv
requirements=$root/deploy/requirements-hf.txt
python=${PYTHON:-python3}
needed_kb=6000000

fail() {
    echo "setup_hf.sh: $1" >&2
    exit 1
}

version_of() { # PACKAGE, as the requirements pin it
    sed -n "s/^$1==\([^ ]*\).*/\1/p" "$requirements"
}

has_both() { # PYTHON: the versions that are pinned, whatever else it has
    "$1" - "$(version_of torch)" "$(version_of transformers)" 2>/dev/null <<'END'
import sys
from importlib.metadata import version

sys.exit(version("torch").split("+")[0] != sys.argv[1] or version("transformers") != sys.argv[2])
END
}

if [ -n "${HF_PYTHON:-}" ]; then
    has_both "$HF_PYTHON" ||
        fail "HF_PYTHON=$HF_PYTHON has not torch $(version_of torch) and transformers $(version_of transformers); name another, or unset it to have an environment made"
    echo "$HF_PYTHON"
    exit 0
fi
# The benchmark's environment of peers has the same versions; one copy of torch is enough.
if [ -f "$root/third_party/bench-hf/.stamp" ] && has_both "$root/third_party/bench-hf/bin/python"; then
    echo "$root/third_party/bench-hf/bin/python"
    exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is missing or older than Python 3.11; name a newer one: PYTHON=python3.12 $0"
mkdir -p "$root/third_party"
exec 9>"$root/third_party/.hf-venv.lock"
flock --wait 3600 9 ||
    fail "another setup has held third_party/.hf-venv.lock for 60 minutes; look for it with: fuser -v third_party/.hf-venv.lock"
# The path is part of it because an environment that was moved does not run.
stamp="$venv $("$python" -V) $(cksum <"$requirements")"
if [ -f "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$stamp" ]; then
    echo "$venv/bin/python"
    exit 0
fi

free_kb=$(df -Pk "$root/third_party" | awk 'NR == 2 { print $4 }')
[ "$free_kb" -ge "$needed_kb" ] ||
    fail "$root/third_party has $((free_kb / 1000)) MB free; torch and transformers need $((needed_kb / 1000)) MB"
echo "setup_hf.sh: installing torch and transformers into third_party/hf-venv (4.7 GB, minutes, once) …" >&2
rm -rf "$venv"
"$python" -m venv "$venv" >&2 || fail "'$python -m venv' failed; on Debian and Ubuntu install python3-venv"
# Pinned by version, not by hash as the small sets are: whether a list of hashes is complete shows only when all of it is
# installed by that list, gigabytes each time, and no run trains or samples with any of this.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements" >&2 ||
    fail "pip could not install $requirements; check the network or the configured package index, then run this again"
# Last, so that an interrupted run leaves no stamp and the next one starts over.
printf '%s\n' "$stamp" >"$venv/.stamp"
echo "$venv/bin/python"
