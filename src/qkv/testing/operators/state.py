"""The state of a recurrent operator: stepped, handed over, indexed, cropped."""

from __future__ import annotations

import torch

from qkv.core.errors import QKVError
from qkv.testing._law import Case, close, expect, law, same
from qkv.testing.operators._inputs import H, N, call, choices, draw, is_recurrent, same_state, slack


@law("operator", "Prefill followed by single steps gives the whole sequence; a step that reads the state before updating "
     "it, or that forgets an extra, breaks it.", applies=lambda case: case.spec.step is not None)  # fmt: skip
def prefill_plus_steps(case: Case) -> None:
    """From the empty state, and after 1, 6 and N - 1 tokens; the given state must stay as it was."""
    for choice in choices(case.spec, True):
        for heads in [{}] + ([{"h": 2 * H, "g": H}] if case.spec.gqa else []):
            inputs = draw(case, choice=choice, **heads)
            whole, end = call(case, inputs, return_state=True)
            for start in (0, 1, 6, N - 1):
                if start:
                    _, state = call(case, inputs.at("nm", slice(0, start)), return_state=True)
                else:
                    state = case.method.initial(inputs.q, inputs.k, inputs.v, **inputs.extras)
                for t in range(start, N):
                    one = inputs.at("nm", slice(t, t + 1))
                    before = {n: x.clone() for n, x in state.tensors.items()}
                    out, new = case.method.step(one.q, one.k, one.v, state, **one.extras)
                    for name, tensor in before.items():
                        same(state[name], tensor, f"the state given to step {t}, {name}, which it must not change")
                    close(out, whole[:, :, t : t + 1], what=f"step {t} after a prefill of {start}", **slack(case))
                    state = new
                same_state(case, state, end, f"the state after steps from {start}")


@law("operator", "The state handed over at any split gives the same outputs and the same final state as one call; a decay "
     "not applied to the state that came in breaks it.", applies=is_recurrent)  # fmt: skip
def state_handover(case: Case) -> None:
    """Every split of N tokens in two, and from the empty state."""
    for choice in choices(case.spec, True):
        inputs = draw(case, choice=choice)
        whole, end = call(case, inputs, return_state=True)
        empty = case.method.initial(inputs.q, inputs.k, inputs.v, **inputs.extras)
        expect(empty.seen == 0, f"the empty state says it has seen {empty.seen} tokens")
        close(call(case, inputs, initial_state=empty), whole, what="from the empty state", **slack(case))
        for split in range(1, N):
            head, state = call(case, inputs.at("nm", slice(0, split)), return_state=True)
            rest = inputs.at("nm", slice(split, None))
            tail, final = call(case, rest, initial_state=state, return_state=True)
            close(torch.cat([head, tail], 2), whole, what=f"split at {split}", **slack(case))
            same_state(case, final, end, f"the final state, split at {split}")


@law("operator", "A state can be indexed by batch (beams): rows repeated or reordered continue as those rows would.",
     applies=is_recurrent)  # fmt: skip
def state_batch_index(case: Case) -> None:
    """Rows 2, 0, 2, 1 of three continue as in the batch they come from; bytes are counted."""
    for choice in choices(case.spec, True):
        inputs = draw(case, b=3, choice=choice)
        rows = torch.tensor([2, 0, 2, 1], device=case.device)
        _, state = call(case, inputs.at("nm", slice(0, 6)), return_state=True)
        rest = inputs.at("nm", slice(6, None))
        want, want_state = call(case, rest, initial_state=state, return_state=True)
        chosen = state.index(rows)
        got, got_state = call(case, rest.at("b", rows), initial_state=chosen, return_state=True)
        close(got, want[rows], what="continued beams", **slack(case))
        same_state(case, got_state, want_state.index(rows), "the state of continued beams")
        held = sum(t.numel() * t.element_size() for t in chosen.tensors.values())
        expect(chosen.bytes == held and 3 * held == 4 * state.bytes,
               f"the state claims {chosen.bytes} bytes for 4 rows and {state.bytes} for 3, holds {held} for 4")  # fmt: skip


@law("operator", "Taking tokens back out of a state is refused, or gives exactly the state before them.",
     applies=is_recurrent)  # fmt: skip
def state_crop(case: Case) -> None:
    """Crop 0 changes nothing; crop 1 and 5 raise a `QKVError` or are exact."""
    inputs = draw(case)
    _, state = call(case, inputs, return_state=True)
    same_state(case, state.crop(0), state, "the state after crop(0)")
    for tokens in (1, 5):
        try:
            got = state.crop(tokens)
        except QKVError:
            continue
        _, want = call(case, inputs.at("nm", slice(0, N - tokens)), return_state=True)
        same_state(case, got, want, f"the state after crop({tokens})")
