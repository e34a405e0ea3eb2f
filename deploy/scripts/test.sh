#!/usr/bin/env bash
# Every test: of the scripts' pure parts, then cargo-nextest where it is installed, cargo test elsewhere; the programs they
# start are built first.
set -euo pipefail
cd "$(dirname "$0")/../.."
for folder in deploy/bench deploy/scripts/parity; do
  python3 -m unittest discover -s "$folder" -p 'test_*.py'
done
cargo build --locked -p agentfly-coordinator -p agentfly-worker
if cargo nextest --version >/dev/null 2>&1; then
  exec cargo nextest run --workspace --locked --no-fail-fast
fi
echo "cargo-nextest is not installed: using cargo test (the same tests, one program after the other)"
cargo test --workspace --locked --no-fail-fast --lib --bins --tests --exclude agentfly-tests
# Whole clusters take all cores: one at a time.
exec cargo test -p agentfly-tests --locked --no-fail-fast --lib --tests -- --test-threads=1
