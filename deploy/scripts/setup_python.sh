#!/usr/bin/env bash
# Makes third_party/sandbox-venv: the Python that the sandbox keeps warm, with the packages of
# deploy/requirements-sandbox.txt. Costs nothing when they have not changed.
#
#   deploy/scripts/setup_python.sh
#
# PYTHON=/path/to/python3   the interpreter to build on (3.11 or newer, with the venv module). Without it: Debian's
#                           /usr/bin/python3, which every user of the node can reach, else python3 on the PATH.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, …) apply as usual, so a mirror or a folder of wheels works.
#
# The stamp file is written last, so a venv without one is an interrupted install and is made anew. While a new venv
# is being made the old one waits beside it, and comes back if the install fails: a venv holds absolute paths, so it
# must be built where it will stay.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
requirements="$root/deploy/requirements-sandbox.txt"
venv="$root/third_party/sandbox-venv"
previous="$venv.previous"
stamp="$venv/.installed"

fail() { printf 'setup_python: %s\n' "$*" >&2; exit 1; }

usable() { # is $1 Python 3.11 or newer with venv and pip's seed?
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

choose_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer with the venv module. Name another one, or install it (Debian: apt-get install python3-venv)."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in /usr/bin/python3 "$(command -v python3 || true)" "$(command -v python3.13 || true)" "$(command -v python3.12 || true)" "$(command -v python3.11 || true)"; do
        if [ -n "$candidate" ] && usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or newer with the venv module. Install one (Debian: apt-get install python3 python3-venv) or name one: PYTHON=/path/to/python3 $0"
}

restore_previous() { # a venv without a stamp goes, and the one that waits beside it comes back
    [ -e "$stamp" ] && return
    rm -rf "$venv"
    if [ -d "$previous" ]; then mv "$previous" "$venv"; fi
}

mkdir -p "$root/third_party"
exec 9>"$root/third_party/.sandbox-venv.lock"
flock --wait 600 9 || fail "another setup has held third_party/.sandbox-venv.lock for 10 minutes; look for it with: fuser -v third_party/.sandbox-venv.lock"

restore_previous # an earlier run may have been killed before it could
python="$(choose_python)"
base="$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable), sys.version.split()[0])')"
wanted="$(sha256sum <"$requirements" | cut -d' ' -f1) $base"

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/python" ]; then
    rm -rf "$previous"
    exit 0
fi

echo "setup_python: installing into third_party/sandbox-venv with $base"
trap restore_previous EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -rf "$previous"
if [ -e "$stamp" ]; then mv "$venv" "$previous"; fi

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes --requirement "$requirements" ||
    fail "could not install the packages of deploy/requirements-sandbox.txt (pip's reason is above).
Without a network: on a machine that has one run
    pip download --no-deps --only-binary :all: -r deploy/requirements-sandbox.txt -d wheels
copy the folder here and run
    PIP_NO_INDEX=1 PIP_FIND_LINKS=\$PWD/wheels $0"
"$venv/bin/python" -m pip check --quiet --disable-pip-version-check >/dev/null ||
    fail "deploy/requirements-sandbox.txt is not complete: run $venv/bin/python -m pip check"
"$venv/bin/python" -I -c 'import numpy, sympy, math_verify' ||
    fail "the packages are installed but cannot be imported with $base (the reason is above)"

printf '%s\n' "$wanted" >"$stamp.writing"
mv "$stamp.writing" "$stamp"
rm -rf "$previous"
echo "setup_python: done"
