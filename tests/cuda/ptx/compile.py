"""Compiling to PTX and machine code without GPU, driver or NVRTC, and properties of the machine code."""

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (10, 0))
VERSION = re.compile(r"^\.version\s+(\S+)", re.M)
DIRECTIVE = re.compile(r"^\.(version|target|address_size)\b.*$", re.M)
DEFINED = re.compile(  # functions and module-level variables that a module defines
    r"^(?:\.(?:visible|extern|common|weak)\s+)*\.(?:(?:entry|func)\s*(?:\([^)]*\)\s*)?"
    r"|(?:shared|global|const)\s+(?:\.align\s+\d+\s+)?\.\w+\s+)([\w$]+)",
    re.M,
)
REQUIRED = os.environ.get("TINYGRAD_BN_CUDA_TOOLS") == "required"  # as in CI: missing tools fail the test


@contextlib.contextmanager
def offline(cc: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """In this block numba-cuda compiles for any compute capability without a device; `cc` stands for the device's.

    The three patched names are private to numba-cuda 0.30.
    """
    device = SimpleNamespace(compute_capability=cc)
    known = tuple((major, minor) for major in range(5, 13) for minor in range(10))
    with contextlib.ExitStack() as stack:
        for name, replacement in (
            ("numba.cuda.dispatcher.get_current_device", lambda: device),
            ("numba.cuda.cudadrv.nvrtc.get_supported_ccs", lambda: known),
            ("numba.cuda.cuda_paths._get_nvrtc_path", lambda: ("none", None)),
        ):
            stack.enter_context(mock.patch(name, replacement))
        yield


def compile_ptx(function, signature, cc: tuple[int, int] = (9, 0), **options: object) -> str:
    """The PTX of a Numba kernel for a signature such as `void(float32[::1])`."""
    from numba import cuda

    with offline(cc):
        return cuda.compile_ptx(function, signature, cc=cc, **options)[0]


@lru_cache
def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit: from the pip packages, CUDA_HOME or PATH; None if not found."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    for folder in (packages, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"):
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    return shutil.which(name)


def unavailable(what: str) -> None:
    """Skip the test; fail it if tools are required."""
    (pytest.fail if REQUIRED else pytest.skip)(f"needs {what}")


def require_compiler() -> None:
    """Skip the test, or fail it if tools are required, unless kernels compile to PTX here."""
    try:
        from numba import cuda

        with offline():
            cuda.compile_ptx(lambda: None, (), cc=(7, 5))
    except Exception as error:
        unavailable(f"numba-cuda with NVVM, of the CUDA toolkit: {error!r}")


@dataclass(frozen=True)
class Assembly:
    """Properties of a kernel that ptxas assembled for one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of static shared memory
    stack: int  # bytes of a thread's stack frame
    spills: int  # bytes of spilled registers, stored and loaded
    sass: tuple[str, ...] = field(repr=False)  # full opcodes of the machine instructions, in order

    def count(self, *stems: str) -> int:
        """The number of machine instructions of these opcodes, with any modifiers: "LDG" counts LDG.E.128 too."""
        return sum(op == s or op.startswith(s + ".") for op in self.sass for s in stems)

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(self.sass)

    @property
    def float64(self) -> int:
        """The number of machine instructions that compute in float64 or convert from or to it."""
        return sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\..*F64|[IF]2[IF]\..*F64|MUFU\..*64", op)) for op in self.sass
        )


def assemble(modules: dict[str, str], cc: tuple[int, int]) -> dict[str, Assembly]:
    """Assemble kernels, each a module with one entry, for an architecture, in one call of ptxas for speed."""
    for name, origin in (("ptxas", "of the CUDA toolkit"), ("nvdisasm", "pip install nvidia-cuda-nvdisasm")):
        if tool(name) is None:
            unavailable(f"{name}: {origin}")
    target = f"sm_{cc[0]}{cc[1]}"
    text = f".version {VERSION.search(next(iter(modules.values())))[1]}\n.target {target}\n.address_size 64\n"
    text += "".join(_renamed(ptx, f"_{k}") for k, ptx in enumerate(modules.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(text)
        command = [tool("ptxas"), "-v", f"-arch={target}", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stderr)
        listing = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    properties = dict(re.findall(r"Compiling entry function '(\w+)'((?:.|\n)*?)(?=Compiling entry|\Z)", done.stderr))
    code = dict(re.findall(r"^\.text\.(\w+):\n((?:.|\n)*?)(?=^\.text\.|\Z)", listing, re.M))
    entries = {re.search(r"_(\d+)$", entry)[1]: entry for entry in properties}
    return {name: _assembly(properties[entries[str(k)]], code[entries[str(k)]]) for k, name in enumerate(modules)}


def _renamed(ptx: str, suffix: str) -> str:
    """A module without its directives, with a suffix on the symbols that it defines."""
    ptx = DIRECTIVE.sub("", re.sub(r"//[^\n]*", "", ptx))
    for symbol in set(DEFINED.findall(ptx)):
        ptx = re.sub(rf"(?<![\w$]){re.escape(symbol)}(?![\w$])", symbol + suffix, ptx)
    return ptx


def _assembly(properties: str, code: str) -> Assembly:
    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, properties)))

    return Assembly(
        registers=number(r"Used (\d+) registers"),
        shared=number(r"(\d+) bytes smem"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill (?:stores|loads)"),
        sass=tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", code)),
    )
