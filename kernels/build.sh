#!/usr/bin/env bash
# Builds what the crate embeds, PTX and machine code, from the CUDA C++ beside this script, and a table of what each kernel takes.
#
#   kernels/build.sh            writes kernels/ptx, kernels/cubin and kernels/registers.txt
#   kernels/build.sh NAME...    of these source files alone, as gemm_few_qkv: seconds each instead of a minute and a half. Of a header
#                               that others include too, only the whole finds what became of them
#   kernels/build.sh --check    builds into a temporary folder; fails where it differs from those by a byte
#
#   below cuda/portable   -> ptx/portable   compute_80
#   below cuda/hopper     -> ptx/hopper     compute_90a ── ptxas ──> cubin   sm_90a
#   else below cuda       -> both: one source for every GPU
#
# The compiler is NVRTC 12.4, whose PTX 8.4 loads on driver 550 and later. The assembler may be of any CUDA 12: drivers
# run machine code of their own major version. Both come from PyPI into a virtual environment ($MINISGL_NVRTC_VENV, by
# default target/nvrtc), so that neither a CUDA toolkit nor a C++ compiler is needed.
set -euo pipefail
kernels=$(cd "$(dirname "$0")" && pwd)
venv=${MINISGL_NVRTC_VENV:-$kernels/../target/nvrtc}
pins=(nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-runtime-cu12==12.4.127 nvidia-cuda-nvcc-cu12==12.9.86)

if [ ! -e "$venv/${pins[*]}" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${pins[@]}"
    touch "$venv/${pins[*]}"
fi
ptxas=$(echo "$venv"/lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
mkdir "$temporary/log"

# compile FOLDER SET SOURCE: the PTX of a source file for a set of kernels, and the machine code of Hopper's. What the assembler says of
# kernels goes to a log; of a file that it refuses, to the user.
compile() {
    local to=$1 set=$2 source=$3 name ptx log arch=compute_80 gpu=sm_80 cubin=/dev/null
    name=$(basename "$source" .cu)
    ptx=$to/ptx/$set/$name.ptx log=$temporary/log/$set.$name
    [ "$set" = portable ] || arch=compute_90a gpu=sm_90a cubin=$to/cubin/$name.cubin
    "$venv/bin/python" "$kernels/nvrtc.py" $arch "$to/ptx/$set" "$source" &&
        { "$ptxas" --verbose --gpu-name $gpu --output-file "$cubin" "$ptx" >"$log" 2>&1 || { cat "$log" >&2; false; }; }
}
export -f compile
export kernels venv ptxas temporary

# sources NAME EXCEPT: the source files of this name, but for those below a folder.
sources() {
    find "$kernels/cuda" -name "$1.cu" -not -path "$kernels/cuda/$2/*" | sort
}

# build FOLDER NAME...: what these source files compile to; '*' is all.
build() {
    local to=$1 name source of_any of_hopper portable=() hopper=()
    shift
    for name in "$@"; do
        mapfile -t of_any < <(sources "$name" hopper)
        mapfile -t of_hopper < <(sources "$name" portable)
        portable+=("${of_any[@]}")
        hopper+=("${of_hopper[@]}")
        [ ${#of_any[@]} -gt 0 ] || [ ${#of_hopper[@]} -gt 0 ] || {
            echo "there is no $name.cu below kernels/cuda" >&2
            return 1
        }
    done
    # Files are known by their names alone, whatever their folders.
    local twice
    twice=$(for set in hopper portable; do
        local -n of_set=$set
        printf '%s\n' "${of_set[@]##*/}" | sort | uniq -d
    done | sort -u)
    [ -z "$twice" ] || {
        echo "two files below kernels/cuda are called ${twice//$'\n'/, }: give one another name" >&2
        return 1
    }
    mkdir -p "$to/ptx/portable" "$to/ptx/hopper" "$to/cubin"
    # As many at once as there are processors.
    for source in "${hopper[@]}"; do printf '%s\0' "$to" hopper "$source"; done >"$temporary/sources"
    for source in "${portable[@]}"; do printf '%s\0' "$to" portable "$source"; done >>"$temporary/sources"
    xargs -0 -n 3 -P "$(nproc)" bash -c 'compile "$@"' compile <"$temporary/sources"
    cat "$temporary"/log/* >"$temporary/ptxas.log"
    "$venv/bin/python" "$kernels/registers.py" "$temporary/ptxas.log" "$to" >"$temporary/registers.txt"
    cp "$temporary/registers.txt" "$to/registers.txt"
}

case ${1:-} in
"")
    rm -rf "$kernels/ptx" "$kernels/cubin" "$kernels/registers.txt"
    build "$kernels" '*'
    ;;
--check)
    fresh=$temporary/fresh
    build "$fresh" '*'
    for built in ptx cubin registers.txt; do
        diff --recursive --brief "$kernels/$built" "$fresh/$built" || {
            diff "$kernels/registers.txt" "$fresh/registers.txt" >&2 || true
            echo "kernels/$built is not what kernels/cuda compiles to: run kernels/build.sh and commit kernels/$built" >&2
            exit 1
        }
    done
    ;;
-*)
    echo "usage: kernels/build.sh [--check | NAME...]" >&2
    exit 2
    ;;
*)
    build "$kernels" "$@"
    ;;
esac
