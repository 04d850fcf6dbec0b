#!/usr/bin/env bash
# Build the engine of this bundle on the machine that it is for, and check it against the examples.
#
#   ./build.sh              TensorRT's own operators
#   ./build.sh library      linear layers by our CUDA kernels, in a plugin that is compiled here
#   ./build.sh aot          the same with the kernels embedded into the engine (TensorRT 10.9 and later)
#
# PYTHON, CXX, NVCC, CUDA_HOME and TENSORRT_INCLUDE name other tools and folders.
# Exit codes: 2 usage, 3 a file is missing or has changed, 6 building or comparing failed, 7 no GPU, library or compiler.
set -euo pipefail

fail() {
  printf 'build.sh: %s\n' "$2" >&2
  exit "$1"
}

plugin="${1:-}"
case "$#$plugin" in 0 | 1library | 1aot) ;; *) fail 2 "usage: build.sh [library|aot]" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v sha256sum > /dev/null || fail 7 "sha256sum is missing; install coreutils"
[ -f SHA256SUMS ] || fail 3 "SHA256SUMS is missing; copy the bundle again"
sha256sum --check --quiet --strict SHA256SUMS >&2 || fail 3 "a file is missing or has changed; copy the bundle again"

# shellcheck source=/dev/null
. ./settings.sh
PYTHON="${PYTHON:-python3}" CXX="${CXX:-g++}" CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
command -v "$PYTHON" > /dev/null || fail 7 "$PYTHON is missing; install Python 3.8 or later, or name one in PYTHON"

# Name the folder of a header, from a list of places.
folder_of() {
  local header="$1" place
  shift
  for place in "$@"; do
    if [ -n "$place" ] && [ -f "$place/$header" ]; then
      printf '%s\n' "$place"
      return
    fi
  done
  return 1
}

# Name the compiler of the kernels.
find_nvcc() {
  local nvcc="${NVCC:-$(command -v nvcc || printf '%s/bin/nvcc' "$CUDA_HOME")}"
  command -v "$nvcc" || fail 7 "there is no nvcc for the kernels; install it, or name one in NVCC"
}

# Compile the kernels that are embedded into the engine to PTX.
embedded() {
  local nvcc bucket kind name bits
  [ -n "$BUCKETS" ] || fail 2 "this bundle has no layer for a plugin, README.md says why; leave out aot"
  nvcc="$(find_nvcc)" || exit $?
  mkdir -p build/ptx
  for bucket in $BUCKETS; do
    IFS=: read -r kind name bits <<< "$bucket"
    # shellcheck disable=SC2086
    "$nvcc" -ptx "-arch=$VIRTUAL" $FLAGS "-DPAREDOWN_KIND=$kind" "-DPAREDOWN_NAME=$name" "-DPAREDOWN_BITS=$bits" \
      -o "build/ptx/paredown_bucket_${name}_b$bits.ptx" kernels/tensorrt/bucket.cu ||
      fail 6 "nvcc does not compile bucket.cu; its messages are above"
  done
}

# Put kernels for this GPU beside the plugin: those of the bundle, or made here.
kernels() {
  local capability="$1" architecture="" known nvcc release unit file separator=""
  for known in $ARCHITECTURES; do
    case "$known" in "sm_$capability" | "sm_${capability}a") architecture="$known" ;; esac
  done
  [ -n "$architecture" ] || fail 7 "this GPU has compute capability $capability, the bundle is for $ARCHITECTURES"
  rm -rf build/cuda.new
  mkdir -p build/cuda.new/cubin
  if compgen -G "kernels/cuda/cubin/*.$architecture.cubin" > /dev/null; then
    cp kernels/cuda/cubin/* build/cuda.new/cubin/
    rm -rf build/cuda
    mv build/cuda.new build/cuda
    return
  fi
  nvcc="$(find_nvcc)" || exit $?
  release="$({ "$nvcc" --version || true; } | sed -n 's/.*release \([0-9]*\)\..*/\1/p')"
  [ -n "$release" ] || fail 7 "$nvcc does not tell its version"
  printf '[' > build/cuda.new/cubin/manifest.json
  for unit in $UNITS; do
    file="${unit%%.cu=*}.$architecture.cubin"
    # shellcheck disable=SC2086
    "$nvcc" -cubin "-arch=$architecture" $FLAGS -Ikernels/cuda -Ikernels -o "build/cuda.new/cubin/$file" \
      "kernels/cuda/${unit%%=*}" || fail 6 "nvcc does not compile ${unit%%=*}; its messages are above"
    printf '%s{"file": "%s", "unit": "%s", "architecture": "%s", "compiler": "nvcc", "driver": [%s, 0], "digest": "%s"}' \
      "$separator" "$file" "${unit%%=*}" "$architecture" "$release" "${unit#*=}" >> build/cuda.new/cubin/manifest.json
    separator=$',\n '
  done
  printf ']\n' >> build/cuda.new/cubin/manifest.json
  rm -rf build/cuda
  mv build/cuda.new build/cuda
}

# Compile the plugin beside its kernels.
library() {
  local capability include runtime
  [ -n "$UNITS" ] || fail 2 "this bundle has no layer for a plugin, README.md says why; leave out library"
  capability="$("$PYTHON" run.py capability)" || exit $?
  command -v "$CXX" > /dev/null || fail 7 "$CXX is missing; install a C++17 compiler, or name one in CXX"
  include="$(folder_of NvInferRuntime.h "${TENSORRT_INCLUDE:-}" "/usr/include/$(uname -m)-linux-gnu" /usr/include \
    /usr/local/tensorrt/include)" || fail 7 "NvInferRuntime.h is missing; install libnvinfer-headers-dev, or name its folder in TENSORRT_INCLUDE"
  runtime="$(folder_of cuda_runtime_api.h "$CUDA_HOME/include" /usr/include)" ||
    fail 7 "cuda_runtime_api.h is missing; install cuda-cudart-dev, or name the toolkit in CUDA_HOME"
  mkdir -p build
  kernels "$capability"
  # shellcheck disable=SC2086
  "$CXX" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -pthread \
    '-DPAREDOWN_BUILD_CUBINS="run ./build.sh library again"' -isystem "$include" -isystem "$runtime" \
    -o build/libparedown_tensorrt.so.new $SOURCES "-L$CUDA_HOME/lib64" "-Wl,-rpath,$CUDA_HOME/lib64" -lcudart -ldl ||
    fail 6 "$CXX does not compile the plugin; its messages are above"
  mv build/libparedown_tensorrt.so.new build/libparedown_tensorrt.so
}

if [ "$plugin" = library ]; then library; fi
if [ "$plugin" = aot ]; then embedded; fi
status=0
"$PYTHON" run.py build ${plugin:+"$plugin"} || status=$?
[ "$status" -le 128 ] ||
  fail 6 "the builder was ended by signal $((status - 128)), which is what the system does where memory runs out; stop other programs"
[ "$status" -eq 0 ] || exit "$status"
"$PYTHON" run.py check ${plugin:+"$plugin"}
