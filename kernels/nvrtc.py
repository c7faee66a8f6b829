"""CUDA C++ in, PTX out: a thin caller of NVRTC, the compiler that NVIDIA ships as a library.

    nvrtc.py ARCH OUT_DIR FILE.cu...

Each FILE.cu becomes OUT_DIR/FILE.ptx for the virtual architecture ARCH (compute_80, compute_90a). The library and its
headers are those of the NVIDIA wheels beside the running Python; build.sh pins their versions. Files are compiled by
name without their folder, so that the PTX does not depend on where the tree lies.
"""

import ctypes
import pathlib
import sys
import sysconfig


def wheels():
    """The folder in which pip puts NVIDIA's wheels."""
    return pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"


def load():
    """The NVRTC library. It opens its built-ins by name, so those are loaded first."""
    lib = wheels() / "cuda_nvrtc" / "lib"
    for builtins in sorted(lib.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    (library,) = [path for path in lib.glob("libnvrtc.so*")]
    return ctypes.CDLL(str(library))


def text_of(nvrtc, program, size_call, text_call):
    """A text that NVRTC holds for a program: its log, or the PTX."""
    size = ctypes.c_size_t()
    getattr(nvrtc, size_call)(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, text_call)(program, text)
    return text.value.decode()


def options(arch):
    """Headers are named from kernels/cuda on, and looked for among the wheels."""
    folders = [pathlib.Path(__file__).resolve().parent / "cuda"]
    folders += [path for path in sorted(wheels().glob("*/include")) if path.parent.name != "cuda_nvcc"]
    flags = [f"--gpu-architecture={arch}", "--std=c++17"]
    return [flag.encode() for flag in flags + [f"--include-path={folder}" for folder in folders]]


def compile_file(nvrtc, arch, source):
    """The PTX of one source file; prints the compiler's log and exits where it has errors."""
    program = ctypes.c_void_p()
    text = source.read_bytes()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None)
    if status != 0:
        sys.exit(f"{source}: NVRTC could not make a program (status {status})")
    flags = options(arch)
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    log = text_of(nvrtc, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").strip()
    if log:
        print(log, file=sys.stderr)
    if status != 0:
        sys.exit(f"{source}: not compiled for {arch}")
    return text_of(nvrtc, program, "nvrtcGetPTXSize", "nvrtcGetPTX")


def main():
    arch, out = sys.argv[1], pathlib.Path(sys.argv[2])
    nvrtc = load()
    for source in map(pathlib.Path, sys.argv[3:]):
        ptx = compile_file(nvrtc, arch, source.resolve())
        (out / source.with_suffix(".ptx").name).write_text(ptx)


main()
