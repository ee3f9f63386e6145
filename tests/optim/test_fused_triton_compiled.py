"""What Triton's compiler makes of the kernels for CUDA devices, none of which it needs for that."""

import re

import pytest

from robust_dist.optim import fused_triton

# Older ones compile by another interface.
triton = pytest.importorskip("triton", minversion="3.3")
compiler = pytest.importorskip("triton.backends.compiler")

KINDS = [
    ("float32", "float32", "float32", "float32", False, False),
    ("float64", "float64", "float64", "float64", False, False),
    ("float16", "float16", "float32", "float32", False, False),
    ("uint16", "uint16", "float32", "float32", False, False),
    ("uint16", "float32", "uint16", "float32", False, True),
    ("uint16", "uint16", "uint16", "float32", True, True),
]


def compiled(kernel, pointers, constants, capability):
    """The kernel's PTX; Triton keeps what it has compiled in its cache."""
    types = dict.fromkeys(kernel.arg_names, "i64") | dict.fromkeys(constants, "constexpr") | pointers | {"count": "i32"}
    source = triton.compiler.ASTSource(kernel.jit, {name: types[name] for name in kernel.arg_names}, constants)
    target = compiler.GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options=dict(fused_triton._OPTIONS))
    assert len(found.asm["cubin"]) > 1000
    return found.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(map(str, kinds)))
def test_step_is_compiled_without_fusing_or_flushing_and_moves_16_bytes_at_a_time(kinds, capability):
    kernels = fused_triton.kernels()
    *types, has_master, stochastic = kinds
    names = ("PARAM_TYPE", "GRAD_TYPE", "EXP_AVG_TYPE", "TYPE")
    constants = {name: getattr(kernels.tl, kind) for name, kind in zip(names, types, strict=True)}
    constants |= {"HAS_MASTER": has_master, "STOCHASTIC": stochastic, "BLOCK": fused_triton.BLOCK}
    ptx = compiled(kernels.step, dict.fromkeys(("table", "grads", "chunks"), "*i64"), constants, capability)
    assert not re.search(r"(add|sub|mul)\.\S*ftz", ptx)
    assert "approx" not in ptx
    assert "div.full" not in ptx
    # float64's root and quotient are made of fused operations, correctly rounded
    assert "fma.rn.f32" not in ptx
    wide = "v2.b64" if types[3] == "float64" else "v4.b32"
    loads, stores = (re.findall(rf"{word}\.global\.v\d\.b\d\d", ptx) for word in ("ld", "st"))
    assert set(loads) == {f"ld.global.{wide}"}
    assert set(stores) == {f"st.global.{wide}"}
    # 8 elements a thread: a load of 16 bytes for each 8 bfloat16, two for 8 float32
    size = {"float64": 8, "float32": 4, "uint16": 2, "float16": 2}
    read = [types[3] if has_master else types[0], *types[1:4]]
    assert len(loads) == sum(size[kind] // 2 for kind in read)


@pytest.mark.parametrize("capability", [80, 90])
def test_advance_is_compiled(capability):
    pointers = {"table": "*i64", "settings": "*i64", "found_inf": "*fp32", "grad_scale": "*fp32"}
    constants = {"FOUND_INF": True, "GRAD_SCALE": True, "RATES": True, "ROWS": fused_triton.ROWS}
    ptx = compiled(fused_triton.kernels().advance, pointers, constants, capability)
    for operation in ("sqrt.rn.f64", "div.rn.f64", "mul.rn.f64"):
        assert operation in ptx
