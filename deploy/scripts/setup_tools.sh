#!/bin/sh
# Makes third_party/tools-venv, the Python environment of deploy/scripts, from deploy/requirements-tools.txt.
# Safe to run again: it does nothing while the stamp names this Python and these requirements, and starts over otherwise.
# Of two at a time the second waits for the first.
# PYTHON names the interpreter to build it with (default python3; at least 3.11).
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
venv=$root/third_party/tools-venv
requirements=$root/deploy/requirements-tools.txt
python=${PYTHON:-python3}

fail() {
    echo "setup_tools.sh: $1" >&2
    exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is missing or older than Python 3.11; name a newer one: PYTHON=python3.12 $0"
mkdir -p "$root/third_party"
exec 9>"$root/third_party/.tools-venv.lock"
flock --wait 600 9 ||
    fail "another setup has held third_party/.tools-venv.lock for 10 minutes; look for it with: fuser -v third_party/.tools-venv.lock"
# The path is part of it because an environment that was moved does not run.
stamp="$venv $("$python" -V) $(cksum <"$requirements")"
if [ -f "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$stamp" ]; then
    exit 0
fi

rm -rf "$venv"
"$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian and Ubuntu install python3-venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --require-hashes --requirement "$requirements" ||
    fail "pip could not install $requirements; check the network or the configured package index, then run this again"
# Last, so that an interrupted run leaves no stamp and the next one starts over.
printf '%s\n' "$stamp" >"$venv/.stamp"
