#!/usr/bin/env bash
# Makes the stubs of protos/ in client/gradbank/v1, or in the folder given. Tools: protos/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client}
mkdir -p "$out/gradbank/v1"
python=${PROTOC_PYTHON:-.venv-protos/bin/python}
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
  protos/gradbank/v1/*.proto
printf '"""Generated from protos/gradbank/v1 by `make protos`; do not edit."""\n' >"$out/gradbank/v1/__init__.py"
