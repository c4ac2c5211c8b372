#!/bin/sh
# Builds the CPU kernel with AddressSanitizer and UndefinedBehaviorSanitizer, and fuzzes its sizes and strides, once per
# instruction set that this machine runs; then its threads with ThreadSanitizer. Usage: run.sh [rounds]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cpu=$here/../../vim_timm/ops/cpu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

fuzz() {
    name=$1 lanes=$2 sanitizer=$3 rounds=$4
    shift 4
    ${CC:-cc} -g -O1 -std=gnu11 -Wall -Wno-psabi -fsanitize="$sanitizer" -fno-sanitize-recover=all -ffp-contract=fast \
        -fno-math-errno -fno-trapping-math "$@" -DKEPT_BYTES=0 -DLANES="$lanes" -DISA="$name" \
        "$here/fuzz.c" "$cpu/runtime.c" -lpthread -o "$out/fuzz"
    "$out/fuzz" "$rounds"
}

rounds=${1:-200}
case $(uname -m) in
x86_64)
    fuzz baseline 4 address,undefined "$rounds"
    grep -qw avx2 /proc/cpuinfo && fuzz avx2 8 address,undefined "$rounds" -mavx2 -mfma
    grep -qw avx512bw /proc/cpuinfo &&
        fuzz avx512 16 address,undefined "$rounds" -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma
    ;;
aarch64 | arm64) fuzz neon 4 address,undefined "$rounds" ;;
*) fuzz baseline 4 address,undefined "$rounds" ;;
esac
fuzz baseline 4 thread "$((rounds / 4))"
