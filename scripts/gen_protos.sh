#!/bin/sh
# Generates the checked-in stubs under OUT (default: the repository) from protos/.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=${1:-$root}
python=${PYTHON:-$root/.venv/bin/python}
cd "$root/protos"
PATH="$(dirname -- "$python"):$PATH"
"$python" -m grpc_tools.protoc -I . \
  --python_out="$out" --mypy_out="$out" \
  phalanx/v1/*.proto
"$python" -m grpc_tools.protoc -I . \
  --grpc_python_out="$out" --mypy_grpc_out=only_async:"$out" \
  phalanx/v1/*_service.proto
