"""Builds rnnfast._C: one torch extension with its CUDA kernels, and one static library per CPU instruction set.

Metadata is in pyproject.toml, the environment variables in the README. Here is only what depends on the torch at hand:
the extension is built against that of the target environment (pip's build isolation merely hides it), else against
DEFAULT_TORCH, and the installed package requires that same minor version.
"""

import os
import platform
import re
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import setup
from setuptools.command.build_clib import build_clib

DEFAULT_TORCH, OLDEST_TORCH = "2.13.0", (2, 11)


def minor(version: str) -> tuple[int, int]:  # "2.13.0+cpu" -> (2, 13)
    return tuple(int(number) for number in re.search(r"(\d+)\.(\d+)", version).groups())


def load_torch():
    """torch.utils.cpp_extension of a torch that is new enough, or None."""
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    hidden += [site.getusersitepackages()] if sys.prefix == sys.base_prefix else []
    before = list(sys.path)
    sys.path.extend(hidden)  # for this import only, so that no build plugin of the target environment takes part
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return None
    finally:
        sys.path[:] = before
    return cpp_extension if minor(cpp_extension.torch.__version__) >= OLDEST_TORCH else None


def cuda_obstacle(cpp_extension) -> str:
    """Why there will be no CUDA kernels; empty where there will be."""
    wanted, home = os.environ.get("RNNFAST_CUDA", "auto"), cpp_extension.CUDA_HOME
    obstacle = "RNNFAST_CUDA=0" if wanted == "0" else "" if cpp_extension.torch.version.cuda else "torch has no CUDA"
    if not obstacle and not all(os.path.exists(f"{home}/{file}") for file in ("bin/nvcc", "include/cuda_runtime.h")):
        obstacle = "no nvcc with its headers was found (CUDA_HOME says where they are)"
    if wanted not in ("0", "1", "auto") or (wanted == "1" and obstacle):
        raise SystemExit(f"RNNFAST_CUDA: expected 0, auto, or 1 where it can be, got {wanted}; {obstacle}".rstrip("; "))
    if not obstacle and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        release = minor(subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True).partition("release")[2])
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"8.0;9.0{';10.0' if release >= (12, 8) else ''}+PTX"
    return obstacle


class build_drivers(build_clib):
    def build_libraries(self, libraries):  # side by side: each is one long compile
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as jobs:
            list(jobs.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


def native_code(cpp_extension):
    """The arguments of setup() that describe the compiled part."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    debug = ["-g0"]
    if os.environ.get("RNNFAST_SANITIZE") == "1":  # the last flag: to fuse a multiply and an add, as math.h expects
        debug = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1", "-fexpensive-optimizations"]
    # The drivers know nothing of torch and are written once; only the flags differ. None of these flags lets the
    # compiler change a result beyond fusing a multiply and an add. -O3 would compile longer and run no faster.
    flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-ffp-contract=fast", *debug]
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *avx2, "-mprefer-vector-width=512"]
    isas = {"avx512": avx512, "avx512_bf16": [*avx512, "-mavx512bf16"], "avx2": avx2} if x86 else {}
    isas["baseline"] = []
    used = {"": ["csrc/math.h", "csrc/cells.h", "csrc/sequence.h", *sorted(glob("csrc/cpu/*.h")), "setup.py"]}
    libraries = {
        f"rnnfast_{isa}": {"sources": [f"csrc/cpu/driver_{isa}.cpp"], "cflags": flags + isas[isa], "obj_deps": used}
        for isa in isas
    }
    obstacle = cuda_obstacle(cpp_extension)
    sources = ["csrc/cpu/dispatch.cpp", *glob("csrc/*.cpp"), *([] if obstacle else glob("csrc/cuda/*.c*"))]
    wheels = glob(f"{cpp_extension.torch.__path__[0]}/../nvidia/cu*/include")  # headers that nvcc may have come without
    cxx = ["-O2", "-fvisibility=hidden", "-fopenmp", "-Wall", *(f"-idirafter{path}" for path in wheels), *debug]
    cxx.append('-DRNNFAST_{}CUDA="{}"'.format("NO_" * bool(obstacle), obstacle or os.environ["TORCH_CUDA_ARCH_LIST"]))
    extension = (cpp_extension.CppExtension if obstacle else cpp_extension.CUDAExtension)(
        "rnnfast._C",
        sorted(sources),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cpu/driver_*.cpp")),
        define_macros=[("RNNFAST_X86", "1")] * x86,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden,-Wall"]},
        extra_link_args=["-fopenmp", *debug],
    )
    commands = {"build_clib": build_drivers, "build_ext": cpp_extension.BuildExtension}
    return {"libraries": list(libraries.items()), "ext_modules": [extension], "cmdclass": commands}


os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
cpp_extension = load_torch()
if cpp_extension is not None:
    major_minor = "{}.{}".format(*minor(cpp_extension.torch.__version__))
    setup(install_requires=[f"torch=={major_minor}.*"], **native_code(cpp_extension))
elif "egg_info" in sys.argv:  # the build frontend asks what it must fetch before it builds
    setup(setup_requires=[f"torch=={DEFAULT_TORCH}"])
else:
    raise SystemExit("rnnfast builds against torch 2.11 or newer: install it first, or let pip isolate the build")
