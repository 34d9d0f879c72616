#!/usr/bin/env python3
"""Stand-ins for CUDA's libraries that open the real ones when a function is first called, so that one program starts where there are
none. For Linux on x86-64.

    python3 scripts/lazy_cuda.py DIR          libcuda.a, libcublas.a, libcurand.a, and the toolkit's libcudart.a: link with -L DIR first
    python3 scripts/lazy_cuda.py --stub DIR   libcuda.so with functions that do nothing: to link with where no driver is installed

The names of the functions are those that cudarc declares. A function whose library or symbol is missing returns an error: what
is asked first (how many GPUs there are) then says that there are none."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# name, the library, cudarc's module, the prefix of its functions, what a missing one returns
LIBRARIES = [
    ("cuda", "libcuda.so.1", "driver", "cu", 100),  # CUDA_ERROR_NO_DEVICE
    ("cublas", "libcublas.so.13", "cublas", "cublas", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    ("cublasLt", "libcublasLt.so.13", "cublaslt", "cublasLt", 1),
    ("curand", "libcurand.so.10", "curand", "curand", 101),  # CURAND_STATUS_NOT_INITIALIZED
    ("nvrtc", "libnvrtc.so.13", "nvrtc", "nvrtc", 1),
]

# A function jumps to the real one; what finds that keeps every register that may hold an argument.
FUNCTION = """
    .globl {name}
    .type {name}, @function
{name}:
    movq {table}+{at}(%rip), %r11
    testq %r11, %r11
    je 1f
    jmp *%r11
1:  pushq ${index}
    jmp {library}_find
"""
FIND = """
{library}_find:
    pushq %rbp
    movq %rsp, %rbp
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %rcx
    pushq %r8
    pushq %r9
    pushq %rax
    pushq %rax
    subq $128, %rsp
{save}
    movq 8(%rbp), %rdi
    andq $-16, %rsp
    call {library}_open
    movq %rax, %r11
    leaq -192(%rbp), %rsp
{restore}
    addq $128, %rsp
    popq %rax
    popq %rax
    popq %r9
    popq %r8
    popq %rcx
    popq %rdx
    popq %rsi
    popq %rdi
    popq %rbp
    addq $8, %rsp
    testq %r11, %r11
    je 2f
    jmp *%r11
2:  movl ${missing}, %eax
    ret
"""
OPEN = """
#include <dlfcn.h>
__attribute__((visibility("hidden"))) void *{table}[{count}];
static const char *const names[] = {{{names}}};
__attribute__((visibility("hidden"))) void *{library}_open(long index) {{
    static void *handle;
    void *library = __atomic_load_n(&handle, __ATOMIC_ACQUIRE);
    if (!library) {{
        library = dlopen("{file}", RTLD_NOW | RTLD_LOCAL);
        if (!library) return 0;
        __atomic_store_n(&handle, library, __ATOMIC_RELEASE);
    }}
    void *function = dlsym(library, names[index]);
    __atomic_store_n(&{table}[index], function, __ATOMIC_RELEASE);
    return function;
}}
"""


def functions(module, prefix):
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    sources = sorted(home.glob(f"registry/src/*/cudarc-0.19.*/src/{module}/sys/mod.rs"))
    if not sources:
        sys.exit("cudarc's sources are not there: cargo fetch first")
    return sorted(set(re.findall(rf"unsafe fn ({prefix}[A-Za-z0-9_]+)\(", sources[-1].read_text())))


def lazy(directory, name, file, module, prefix, missing):
    names = functions(module, prefix)
    library, table = f"lazy_{name}", f"lazy_{name}_table"
    moves = lambda form: "\n".join("    " + form.format(at=16 * i, i=i) for i in range(8))
    assembly = ["    .text"]
    assembly += [FUNCTION.format(name=function, table=table, at=8 * i, index=i, library=library) for i, function in enumerate(names)]
    save, restore = moves("movups %xmm{i}, {at}(%rsp)"), moves("movups {at}(%rsp), %xmm{i}")
    assembly += [FIND.format(library=library, missing=missing, save=save, restore=restore), '    .section .note.GNU-stack,"",@progbits\n']
    quoted = ", ".join(f'"{function}"' for function in names)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "jump.s").write_text("\n".join(assembly))
        (scratch / "open.c").write_text(OPEN.format(table=table, count=len(names), names=quoted, library=library, file=file))
        for source in ("jump.s", "open.c"):
            subprocess.run(["cc", "-O2", "-fPIC", "-c", scratch / source, "-o", scratch / f"{source}.o"], check=True)
        archive = directory / f"lib{name}.a"
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", archive, scratch / "jump.s.o", scratch / "open.c.o"], check=True)


def main():
    stub = sys.argv[1:2] == ["--stub"]
    if len(sys.argv) != 2 + stub:
        sys.exit(__doc__)
    directory = pathlib.Path(sys.argv[-1])
    directory.mkdir(parents=True, exist_ok=True)
    if stub:
        with tempfile.NamedTemporaryFile("w", suffix=".c") as source:
            source.write("".join(f"int {name}(void) {{ return 999; }}\n" for name in functions("driver", "cu")))
            source.flush()
            soname = "-Wl,-soname,libcuda.so.1"
            subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", directory / "libcuda.so", source.name], check=True)
        return
    for library in LIBRARIES:
        lazy(directory, *library)
    home = os.environ.get("CUDA_HOME") or sys.exit("CUDA_HOME: where the CUDA toolkit is")
    shutil.copy(pathlib.Path(home) / "lib64/libcudart_static.a", directory / "libcudart.a")


if __name__ == "__main__":
    main()
