#!/bin/sh
# Generates the checked-in stubs under OUT (default: the repository) from protos/.
# PYTHON names an interpreter with the development tools; .venv-test or .venv by default.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=${1:-$root}
for python in "${PYTHON:-}" "$root/.venv-test/bin/python" "$root/.venv/bin/python"; do
  if [ -x "$python" ]; then break; fi
done
PATH="$(dirname -- "$python"):$PATH"
cd "$root/protos"
"$python" -m grpc_tools.protoc -I . \
  --python_out="$out" --mypy_out="quiet:$out" \
  phalanx/v1/*.proto
"$python" -m grpc_tools.protoc -I . \
  --grpc_python_out="$out" --mypy_grpc_out="only_async,quiet:$out" \
  phalanx/v1/*_service.proto
