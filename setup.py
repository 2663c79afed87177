"""Builds rnnfast._C: one torch extension and, linked into it, one static library per CPU instruction set.

Metadata lives in pyproject.toml. Here is only what depends on the torch at hand: the extension is built against the
torch that the target environment already has (pip's build isolation merely hides it), else against DEFAULT_TORCH, and
the installed package requires that same minor version.

Environment variables:
  MAX_JOBS          parallel compile jobs (default 2)
  RNNFAST_SANITIZE  1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see .ci/sanitize)
"""

import os
import platform
import re
import site
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import setup
from setuptools.command.build_clib import build_clib

DEFAULT_TORCH = "2.13.0"
OLDEST_TORCH = (2, 11)


def minor(version: str) -> tuple[int, int]:
    """'2.13.0+cpu' -> (2, 13)."""
    major, rest = version.split(".")[:2]
    return int(major), int(re.match(r"\d+", rest).group())


def load_torch():
    """torch.utils.cpp_extension of a torch that is new enough, or None."""
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        hidden.append(site.getusersitepackages())
    before = list(sys.path)
    sys.path.extend(hidden)  # for this import only, so that no build plugin of the target environment takes part
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return None
    finally:
        sys.path[:] = before
    return cpp_extension if minor(cpp_extension.torch.__version__) >= OLDEST_TORCH else None


class build_drivers(build_clib):
    """Compiles the libraries side by side: each is one long compile."""

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as jobs:
            list(jobs.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


def native_code(cpp_extension):
    """The arguments of setup() that describe the compiled part."""
    headers = sorted(glob("csrc/**/*.h", recursive=True))
    driver_headers = ["csrc/math.h", "csrc/cells.h", "csrc/sequence.h", *sorted(glob("csrc/cpu/*.h"))]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    debug = sanitize if os.environ.get("RNNFAST_SANITIZE") == "1" else ["-g0"]

    # The drivers know nothing of torch and are written once; only the flags differ. None of these flags lets the
    # compiler change a result beyond fusing a multiply and an add.
    driver_flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
    driver_flags += ["-fno-trapping-math", "-ffp-contract=fast", *debug]
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *avx2, "-mprefer-vector-width=512"]
    isas = {"avx512": avx512, "avx2": avx2, "baseline": []} if x86 else {"baseline": []}
    drivers = {isa: f"csrc/cpu/driver_{isa}.cpp" for isa in isas}
    libraries = [
        (
            f"rnnfast_{isa}",
            {"sources": [source], "cflags": driver_flags + isas[isa], "obj_deps": {"": [*driver_headers, "setup.py"]}},
        )
        for isa, source in drivers.items()
    ]

    # CUDA sources will join here: csrc/cuda/*.cu by cpp_extension.CUDAExtension, when torch has CUDA and nvcc is there.
    every_source = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    extension = cpp_extension.CppExtension(
        "rnnfast._C",
        sorted(source for source in every_source if not os.path.basename(source).startswith("driver_")),
        depends=headers + list(drivers.values()),
        define_macros=[("RNNFAST_X86", "1")] if x86 else [],
        extra_compile_args=["-O2", "-fvisibility=hidden", "-fopenmp", "-Wall", *debug],
        extra_link_args=["-fopenmp", *(sanitize if debug is sanitize else [])],
    )
    commands = {"build_clib": build_drivers, "build_ext": cpp_extension.BuildExtension}
    return {"libraries": libraries, "ext_modules": [extension], "cmdclass": commands}


os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
cpp_extension = load_torch()
if cpp_extension is not None:
    required = "torch=={}.{}.*".format(*minor(cpp_extension.torch.__version__))
    setup(install_requires=[required], **native_code(cpp_extension))
elif "egg_info" in sys.argv:  # the build frontend asks what it must fetch before it builds
    setup(setup_requires=[f"torch=={DEFAULT_TORCH}"])
else:
    raise SystemExit("rnnfast builds against torch 2.11 or newer: install it first, or let pip isolate the build")
