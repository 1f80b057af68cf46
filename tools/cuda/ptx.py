#!/usr/bin/env python3
"""Makes crates/cuda/kernels/product.ptx of product.cu beside it, with NVIDIA's run-time compiler. No GPU is needed.

    python3 -m venv V && V/bin/pip install -r tools/cuda/requirements.txt
    V/bin/python tools/cuda/ptx.py             writes the PTX
    V/bin/python tools/cuda/ptx.py --check     fails if the committed one is another
    V/bin/python tools/cuda/ptx.py --report    what assembling it for GPUs takes: registers, spilled bytes, shared memory

PTX is for compute capability 8.0; a driver compiles it for whatever GPU of that or a later one it has. The compiler is the
first of CUDA 12, because its PTX is understood by every driver since 525.
"""

import argparse
import ctypes
import importlib.util
import pathlib
import sys

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "crates/cuda/kernels"
OPTIONS = ["--std=c++17"]
VIRTUAL = "compute_80"
# A100; RTX 30, 40; H100.
REAL = ["sm_80", "sm_86", "sm_89", "sm_90"]


def library():
    package = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if package is None:
        sys.exit("nvidia-cuda-nvrtc-cu12 is not installed: pip install -r tools/cuda/requirements.txt")
    (folder,) = package.submodule_search_locations
    return ctypes.CDLL(str(pathlib.Path(folder) / "lib/libnvrtc.so.12"))


class Compiler:
    def __init__(self):
        self.nvrtc = library()
        self.nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        code = getattr(self.nvrtc, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: {self.nvrtc.nvrtcGetErrorString(code).decode()}")

    def text(self, what, program):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, text)
        return text.raw.rstrip(b"\0").decode(errors="replace")

    def compile(self, source, architecture, more=()):
        """The PTX, and what the compiler said."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source, b"product.cu", 0, None, None)
        options = [f"--gpu-architecture={architecture}", *OPTIONS, *more]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self.call("nvrtcCompileProgram", program, len(options), array)
        except RuntimeError:
            sys.exit(self.text("ProgramLog", program))
        return self.text("PTX", program), self.text("ProgramLog", program)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    source = (KERNELS / "product.cu").read_bytes()
    compiler = Compiler()
    if arguments.report:
        for architecture in REAL:
            print(f"== {architecture}")
            print(compiler.compile(source, architecture, ["--ptxas-options=-v"])[1])
        return
    ptx, said = compiler.compile(source, VIRTUAL)
    if said.strip():
        sys.exit(f"the compiler has something to say:\n{said}")
    committed = KERNELS / "product.ptx"
    if arguments.check:
        if committed.read_text() != ptx:
            sys.exit(f"{committed} is not what product.cu gives: run tools/cuda/ptx.py")
        print(f"{committed.name} is what product.cu gives")
    else:
        committed.write_text(ptx)


if __name__ == "__main__":
    main()
