"""No op reads or writes outside its tensors: they end, or begin, where memory ends, and to go on kills the process.

Run as a program, ``test_bounds.py ISA CELL...``, it does that for some cells; the tests run it. Linux.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from strategies import Case
from torch import Tensor

from rnnfast import _C, reference

CELLS = [cell["name"] for cell in _C.cells()]
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []  # as long as tensors look into them


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy whose last byte is the last before a page that cannot be touched, or its first the first after one."""
    flat = tensor.detach().contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    _kept.append(memory)
    offset = (pages + 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=flat.dtype, count=flat.numel(), offset=offset)
    copy.copy_(flat)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(begin + page * mmap.PAGESIZE), mmap.PAGESIZE, no_access) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy.view(tensor.shape)


def forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    """Run a case, all its tensors at the end of memory and then at its beginning."""
    for at_end in (True, False):
        call = case.call(dtype)
        tensors = {name: guarded(tensor, at_end) for name, tensor in call.tensors.items()}
        options = {name: guarded(x, at_end) if isinstance(x, Tensor) else x for name, x in call.options.items()}
        call = replace(call, tensors=tensors, options=options).with_grad()
        outputs = [y for y in call(call.op()) if y.requires_grad]
        grads = [guarded(torch.ones_like(y), at_end) for y in outputs]
        torch.autograd.grad(outputs, list(call.tensors.values()), grads)


def main(isa: str, cells: list[str]) -> None:
    """Sizes with every kind of remainder; few rows, whose weights are read in place, and many, rearranged."""
    _C.set_isa(isa)
    for cell in cells:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for H in (1, 7, 17, 24, 33, 49):
                for I in (1, 5, 16, 19):  # noqa: E741
                    for N, T in ((1, 2), (3, 1), (9, 4)):
                        forward_and_backward(Case(cell, T=T, N=N, I=I, H=H), dtype)
            bounds = {"lengths": (4, 0, 3, 1, 2), "resets": True, "masks": frozenset({"recurrent_mask", "zoneout_h"})}
            forward_and_backward(Case(cell, T=4, N=5, I=3, H=20, **bounds), dtype)
            if reference.CELLS[cell].has_projection:
                forward_and_backward(Case(cell, T=3, N=9, I=5, H=33, P=17), dtype)
                forward_and_backward(Case(cell, T=2, N=1, I=5, H=33, P=7), dtype)
            _kept.clear()
    if not cells:  # one number too many
        print(ctypes.string_at(guarded(torch.zeros(3), True).data_ptr(), 13))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this file as a program."""
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa_name", _C.supported_isas())
def test_every_cell_stays_inside(isa_name):
    done = run(isa_name, *CELLS)
    assert done.returncode == 0, done.stderr


def test_one_number_too_many_is_noticed():
    assert run(_C.supported_isas()[0]).returncode == -signal.SIGSEGV


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
