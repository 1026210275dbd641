"""Programs of several simulated devices keep one order of collectives (design: platform.md 6)."""

import pytest

from internvlx_jax.aot.hlo import COLLECTIVES, _callees, _parse
from internvlx_jax.training.executables import compile_train_step
from internvlx_jax.training.run import open_run

LOOP_AND_GATHER = """
HloModule example, is_scheduled=true

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (a: f32[8], b: f32[4]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %loop = f32[8]{0} while(%a), condition=%condition, body=%body
  %more = f32[8]{0} negate(%loop)
  %gather = f32[8]{0} all-gather(%b), replica_groups={{0,1}}, dimensions={0}
  ROOT %last = f32[8]{0} all-reduce(%more), replica_groups={{0,1}}, to_apply=%add
}
"""


def is_collective(instruction):
    return instruction.op.removesuffix("-start") in COLLECTIVES


def overtaking(text):
    """Returns (loop, what may run beside it): both of them communicate, and nothing orders them.

    XLA:CPU takes a loop, call or conditional as past when it has been started. What comes later in
    the schedule, in which order the text is, waits for its end only if it needs the result.
    """
    computations, _ = _parse(text)

    def communicates(instruction):
        return is_collective(instruction) or any(
            communicates(inner)
            for callee in _callees(instruction)
            for inner in computations[callee]
        )

    pairs = []
    for body in computations.values():
        needs, loops = {}, []
        for instruction in body:
            operands = instruction.operands
            needs[instruction.name] = set(operands).union(*(needs.get(o, ()) for o in operands))
            if communicates(instruction):
                free = [loop for loop in loops if loop not in needs[instruction.name]]
                pairs += [(loop, instruction.name) for loop in free]
                loops += [] if is_collective(instruction) else [instruction.name]
    return pairs


def test_what_may_overtake_a_loop_is_found():
    assert overtaking(LOOP_AND_GATHER) == [("loop", "gather")]


@pytest.mark.slow
def test_no_collective_of_a_step_overtakes_a_loop(tiny_run):
    """With other flags of XLA in `conftest.py` there were 86, and steps died now and then."""
    run = open_run(tiny_run())
    plan = run.loader.plan
    text = compile_train_step(run.setup, plan.buckets[-1], plan.rows[-1]).as_text()
    computations, entry = _parse(text)
    assert sum(i.op in COLLECTIVES for i in computations[entry]) > 50
    assert overtaking(text) == []
