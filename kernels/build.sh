#!/usr/bin/env bash
# Builds the PTX that the crate embeds from the CUDA C++ beside this script.
#
#   kernels/build.sh            writes kernels/ptx
#   kernels/build.sh --check    builds into a temporary folder; fails where it differs from kernels/ptx by a byte
#
#   cuda/*.cu            -> ptx/portable   compute_80: one source for every GPU
#   cuda/portable/*.cu   -> ptx/portable   compute_80: families that cuda/hopper does otherwise
#   cuda/hopper/*.cu     -> ptx/hopper     compute_90a
#
# The compiler is NVRTC 12.4, whose PTX 8.4 loads on driver 550 and later. It comes from PyPI into a virtual environment
# ($MINISGL_NVRTC_VENV, by default target/nvrtc), so that neither a CUDA toolkit nor a C++ compiler is needed.
set -euo pipefail
shopt -s nullglob
kernels=$(cd "$(dirname "$0")" && pwd)
venv=${MINISGL_NVRTC_VENV:-$kernels/../target/nvrtc}
pins=(nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-runtime-cu12==12.4.127)

if [ ! -e "$venv/${pins[0]}" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${pins[@]}"
    touch "$venv/${pins[0]}"
fi

build() {
    mkdir -p "$1/portable" "$1/hopper"
    "$venv/bin/python" "$kernels/nvrtc.py" compute_80 "$1/portable" "$kernels"/cuda/*.cu "$kernels"/cuda/portable/*.cu
    "$venv/bin/python" "$kernels/nvrtc.py" compute_90a "$1/hopper" "$kernels"/cuda/hopper/*.cu
}

case ${1:-} in
"")
    rm -rf "$kernels/ptx"
    build "$kernels/ptx"
    ;;
--check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    build "$fresh"
    diff --recursive --brief "$kernels/ptx" "$fresh" || {
        echo "kernels/ptx is not what kernels/cuda compiles to: run kernels/build.sh and commit kernels/ptx" >&2
        exit 1
    }
    ;;
*)
    echo "usage: kernels/build.sh [--check]" >&2
    exit 2
    ;;
esac
