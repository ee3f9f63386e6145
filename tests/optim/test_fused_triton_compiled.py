"""What Triton's compiler makes of the kernels for CUDA devices, none of which it needs for that."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from robust_dist.optim import fused_triton

# Older ones compile by another interface.
triton = pytest.importorskip("triton", minversion="3.3")
compiler = pytest.importorskip("triton.backends.compiler")

KINDS = [
    ("float32", "float32", "float32", "float32", False, False, False),
    ("float64", "float64", "float64", "float64", False, False, False),
    ("float16", "float16", "float32", "float32", False, False, False),
    ("uint16", "uint16", "float32", "float32", False, False, False),
    ("uint16", "float32", "uint16", "float32", False, True, False),
    ("uint16", "uint16", "uint16", "float32", True, True, False),
]
AVERAGING = [(*KINDS[i][:-1], True) for i in (0, 3, 5)]  # float64 spills 40 bytes there


BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = [80, 90, 100]
# Every combination for Hopper, the widest and the narrowest for the others.
CASES = [(kinds, 90) for kinds in KINDS + AVERAGING]
CASES += [(kinds, capability) for kinds in (KINDS[0], KINDS[-1], AVERAGING[0]) for capability in (80, 100)]
REGISTERS = 128  # so that a processor of 65,536 holds four programs of 128 threads


def compiled(kernel, pointers, constants, capability):
    """The kernel as Triton's compiler leaves it; Triton keeps what it has compiled in its cache."""
    types = dict.fromkeys(kernel.arg_names, "i64") | dict.fromkeys(constants, "constexpr") | pointers | {"count": "i32"}
    source = triton.compiler.ASTSource(kernel.jit, {name: types[name] for name in kernel.arg_names}, constants)
    target = compiler.GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options=dict(fused_triton._OPTIONS))
    assert len(found.asm["cubin"]) > 1000
    return found


def compiled_step(kinds, capability):
    kernels = fused_triton.kernels()
    *types, has_master, stochastic, averages = kinds
    names = ("PARAM_TYPE", "GRAD_TYPE", "EXP_AVG_TYPE", "TYPE")
    constants = {name: getattr(kernels.tl, kind) for name, kind in zip(names, types, strict=True)}
    constants |= {"HAS_MASTER": has_master, "STOCHASTIC": stochastic, "AVERAGES": averages, "BLOCK": fused_triton.BLOCK}
    return compiled(kernels.step, dict.fromkeys(("table", "grads", "chunks"), "*i64"), constants, capability)


def disassembled(found, tmp_path):
    """How often each instruction moves data, by width; the kernel's registers, bytes of stack and of local memory."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])

    def said(program, *words):
        if not (BIN / program).exists():
            pytest.skip(f"this Triton brings no {program}")
        done = subprocess.run([BIN / program, *words, cubin], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    moves = Counter(re.findall(r"\b(LDG|STG|LDL|STL)\.E?(?:[.\w]*\.)?(128|64|U16|U8)?\b", said("nvdisasm", "-c")))
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said("cuobjdump", "--dump-resource-usage"))
    return moves, [int(number) for number in usage[0]]


def width(kinds):
    return {"float64": 8, "float32": 4, "uint16": 2, "float16": 2}[kinds]


@pytest.mark.parametrize(("kinds", "capability"), CASES, ids=lambda case: str(case).replace("'", ""))
def test_step_moves_16_bytes_at_a_time_and_spills_fuses_and_flushes_nothing(kinds, capability, tmp_path):
    *types, has_master, _, averages = kinds
    found = compiled_step(kinds, capability)
    assert not re.search(r"(add|sub|mul)\.\S*ftz", found.asm["ptx"])
    assert "approx" not in found.asm["ptx"]
    assert "div.full" not in found.asm["ptx"]
    # float64's root and quotient are made of fused operations, correctly rounded
    assert "fma.rn.f32" not in found.asm["ptx"]
    moves, (registers, stack, local) = disassembled(found, tmp_path)
    assert registers <= REGISTERS
    assert (stack, local) == (0, 0)
    assert not any(name in ("LDL", "STL") for name, _ in moves)
    # 8 elements a thread: an access of 16 bytes for each 8 of bfloat16, two for 8 of float32
    read = [types[3] if has_master else types[0], *types[1:4], *([types[3]] if averages else [])]
    written = [types[0], *types[2:4], *([types[3]] * (has_master + averages))]
    assert moves["LDG", "128"] == sum(width(kind) // 2 for kind in read)
    assert moves["STG", "128"] == sum(width(kind) // 2 for kind in written)


def test_an_odd_gradient_alone_is_read_narrowly():
    """Beside the wide loads of whole blocks there are 8 narrow ones, under the predicate that says so."""
    ptx = compiled_step(KINDS[0], 90).asm["ptx"]
    first = ptx.index("ld.global.v4.b32")
    loop = ptx[ptx.rindex("\n", 0, first) : ptx.index("bra", first)]
    wide, narrow = re.findall(r"(@\S+)?\s+ld\.global\.v4\.b32", loop), re.findall(r"(@\S+) ld\.global\.b32", loop)
    assert len(wide) == 8
    assert sum(map(bool, wide)) == 2
    assert len(narrow) == 8
    assert len(set(narrow)) == 1
    assert not set(narrow) & set(wide)
    assert len(re.findall(r"st\.global\.v4\.b32", loop)) == 6


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_advance_is_compiled(capability, averages, tmp_path):
    pointers = {"table": "*i64", "settings": "*i64", "found_inf": "*fp32", "grad_scale": "*fp32"}
    constants = {"FOUND_INF": True, "GRAD_SCALE": True, "RATES": True, "AVERAGES": averages, "ROWS": fused_triton.ROWS}
    found = compiled(fused_triton.kernels().advance, pointers, constants, capability)
    for operation in ("sqrt.rn.f64", "div.rn.f64", "mul.rn.f64"):
        assert operation in found.asm["ptx"]
    moves, (_, stack, local) = disassembled(found, tmp_path)
    assert (stack, local) == (0, 0)
    assert moves["LDG", "64"] > 0
