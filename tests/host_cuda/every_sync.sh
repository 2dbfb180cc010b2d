#!/bin/sh
# every_sync.sh PROGRAM: every __syncthreads of the CUDA kernel is needed, and none can be left out unnoticed. PROGRAM is
# tests/mlp_denoise_cuda_test.cpp under ThreadSanitizer.
program=$1
kernel=$(dirname "$0")/../../kernels/cuda/mlp_denoise.cuh
export TSAN_OPTIONS="halt_on_error=1 exitcode=66"
lines=$(grep -n '^[^/]*__syncthreads()' "$kernel" | cut -d : -f 1)
test -n "$lines" || { echo "FAILED: no __syncthreads in $kernel"; exit 1; }
for line in 0 $lines; do
  timeout 60 "$program" --without-sync "$line" > /dev/null 2>&1
  case $line:$? in
    0:0 | [1-9]*:1 | [1-9]*:66) ;;
    0:*) echo "FAILED: $program, with every __syncthreads"; exit 1 ;;
    *) echo "FAILED: unnoticed without the __syncthreads of $kernel:$line"; exit 1 ;;
  esac
done
echo "every __syncthreads is needed:" $lines
