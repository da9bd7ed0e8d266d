"""What is read from compiled programs, what chips are asked for, and what is said of a plan."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from faithdiff_jax.errors import InputError
from faithdiff_jax.planning.chips import CHIPS, GPUS, STAND_INS, gpus, tpu_slice
from faithdiff_jax.planning.hlo import Collective, Traffic, traffic
from faithdiff_jax.planning.plan import Plan
from faithdiff_jax.planning.roofline import roofline, utilisation
from faithdiff_jax.sharding import make_mesh

FLOAT = 4


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def laid_out(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(make_mesh(data=8), PartitionSpec(*axes)))


def test_a_sum_over_devices_is_one_all_reduce():
    """Rows of x and of w lie on eight devices, so that their product is summed over them."""
    text = compiled(lambda x, w: x @ w, laid_out((16, 64), None, "data"), laid_out((64, 32), "data", None))
    (found,) = traffic(text).collectives
    assert found == Collective("all-reduce", 8, 16 * 32 * FLOAT, 1)
    assert found.sent == 2 * 7 / 8 * 16 * 32 * FLOAT


@pytest.mark.parametrize("trips", [1, 5])
def test_loops_are_multiplied_out(trips):
    """Each round needs the whole of a matrix of which a device has an eighth."""

    def body(x, _):
        return jnp.tanh(x @ jnp.tanh(x.T @ x)), None

    text = compiled(
        lambda x: jax.lax.scan(body, x, length=trips)[0],
        laid_out((64, 16), "data", None),
    )
    found = traffic(text).collectives
    assert {collective.kind for collective in found} == {"all-reduce"}
    assert sum(collective.count for collective in found) == trips


def test_memory_traffic_of_one_product():
    array = jax.ShapeDtypeStruct((256, 128), jnp.float32), jax.ShapeDtypeStruct((128, 64), jnp.float32)
    found = traffic(compiled(lambda x, w: x @ w, *array))
    assert not found.collectives
    assert found.memory_bytes == FLOAT * (256 * 128 + 128 * 64 + 256 * 64)


def test_a_slice_of_a_stack_counts_as_the_slice():
    """A loop over a stack of eight matrices reads each once, not the stack eight times."""
    stack, x = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32), jax.ShapeDtypeStruct((4, 128), jnp.float32)
    text = compiled(lambda x, stack: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], x, stack)
    whole = FLOAT * 8 * 128 * 128
    # Sliced out, which reads and writes it, and read by the product.
    assert whole <= traffic(text).memory_bytes < 3.5 * whole


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%gathered (a: bf16[64,8]) -> bf16[512,8] {
  %a = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=[2,8]<=[16]
}

%again (b: bf16[64,8]) -> bf16[512,8] {
  %b = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=7, replica_groups=[2,8]<=[16]
}

%below (arg: (s32[], f32[1024])) -> pred[] {
  %arg = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %limit = s32[]{:T(128)} constant(20)
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%round (arg.1: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %arg.1 = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x = f32[1024]{0:T(1024)} get-tuple-element(%arg.1), index=1
  %on_chip = f32[1024]{0:T(1024)S(1)} negate(%x)
  %y = f32[1024]{0:T(1024)} all-reduce(%on_chip), channel_id=9, replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) tuple(%i, %y)
}

ENTRY %main (p: bf16[64,8], q: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %q = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(1)
  %start = bf16[512,8]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%gathered
  %end = bf16[512,8]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%again
  ROOT %loop = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) while(%q), condition=%below, body=%round
}
"""


def test_what_tpus_compiler_writes():
    """Loops by the constant of their condition, groups by axes of a mesh, a gather over two fusions, on-chip memory."""
    found = traffic(TPU_TEXT)
    assert set(found.collectives) == {
        Collective("all-reduce", 8, 1024 * 4, 20),
        Collective("all-gather", 8, 512 * 8 * 2, 1),
    }
    fusions = 2 * (64 * 8 + 512 * 8) * 2
    in_the_loop = 20 * (1024 * 4 + 1024 * 4)  # one read of x, one write of y; what is in between stays on the chip
    assert found.memory_bytes == fusions + in_the_loop


def test_slices_and_machines():
    target = tpu_slice("v5e:4x4")
    assert (target.count, target.topology, target.is_gpu) == (16, "v5e:4x4", False)
    assert tpu_slice("v5p:2x2x4").count == 16
    target = gpus("h100:8")
    assert (target.count, target.topology, target.is_gpu) == (8, "v5p:2x2x2", True)
    for name in GPUS:
        for count, sides in STAND_INS.items():
            assert gpus(f"{name}:{count}").count <= tpu_slice(f"v5p:{sides}").count


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (tpu_slice, "v9:4x4", "must be one of v4, v5e, v5p, v6e"),
        (tpu_slice, "v5e", "v5e has 2 axes, such as v5e:2x2"),
        (tpu_slice, "v5e:4x4x4", "v5e has 2 axes"),
        (tpu_slice, "v5p:4x4", "v5p has 3 axes"),
        (tpu_slice, "v5e:0x4", "0 chips"),
        (tpu_slice, "v5p:99x99x99", "970,299 chips"),
        (gpus, "h100", "must be one of 1, 2, 4, 8"),
        (gpus, "h100:3", "must be one of 1, 2, 4, 8"),
        (gpus, "v5e:4x4", "must be one of a100, h100"),
    ],
)
def test_what_there_is_not_is_refused(parse, text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def plan(**changes) -> Plan:
    figures = Plan(
        title="a step",
        target=tpu_slice("v5e:4x4"),
        held={"trained": 3 * 2**30},
        temporary=8 * 2**30,
        model_flops=100e12,
        all_flops=130e12,
        traffic=Traffic(80e9, (Collective("all-gather", 16, 10**9, 40), Collective("all-reduce", 16, 10**6, 1))),
        repeats=46000,
    )
    return dataclasses.replace(figures, **changes)


def test_time_and_utilisation_by_hand():
    time = plan().time
    assert time.arithmetic == pytest.approx(130 / 16 / 197)
    assert time.memory == pytest.approx(80 / 819)
    assert time.interconnect == pytest.approx((40 * 15 / 16 + 0.001 * 2 * 15 / 16) / 100)
    assert time.limit == "interconnect"
    assert time.overlapped == time.interconnect
    assert time.one_by_one == pytest.approx(sum(time.parts.values()))
    assert plan().utilisations[1] == pytest.approx(100 / 16 / 197 / time.interconnect)
    assert utilisation(130e12, roofline(130e12, Traffic(0, ()), plan().target).overlapped, plan().target) == 1


def test_a_plan_for_people():
    text = "\n".join(plan().lines())
    assert "11.00 GiB of 16.0: fits, 5.0 GiB to spare" in text
    assert "100.00 TFLOP on all chips, and 30% computed again" in text
    assert "40 of 953.7 MiB among 16" in text
    assert "46,000 steps" in text
    assert "Change first" not in text
    text = "\n".join(plan(temporary=14 * 2**30, advice="accumulation=2").lines())
    assert "does not fit, 1.0 GiB too much" in text
    assert "Change first: accumulation=2" in text
    assert "v5p:2x2x2" in "\n".join(plan(target=gpus("h100:8")).lines())


def test_a_plan_as_json():
    figures = json.loads(plan().json())
    assert figures["fits"] is True
    assert figures["collectives"][0] == {"kind": "all-gather", "devices": 16, "size": 10**9, "count": 40}
    assert figures["seconds_one_by_one"] == plan().time.one_by_one
    assert figures["bytes_of_a_chip"] == CHIPS["v5e"].memory
