"""The laws of probes: what every measurement must keep, whatever it looks for.

A probe reads. Its numbers are checked on models whose attention maps are written by hand (`_planted`), through the same path
that measures a real model.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qkv.core.heads import HeadTable
from qkv.core.probe import Result, Scene
from qkv.testing._law import Case, close, expect, law, same
from qkv.testing._tiny import decoder, snapshot, weights

LAYERS, HEADS, KV_HEADS = 3, 4, 2


def _run(case: Case, model: Any) -> Result:
    return case.method.run(model, **case.spec.example(model))


class Tape:
    """Every forward call of a model while it is open: inputs and logits, to be played again without a probe."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []

    def __enter__(self) -> Tape:
        self.handle = self.model.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()

    def _record(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((args, dict(kwargs), output.past_key_values, output.logits.detach().clone()))

    @torch.no_grad()
    def replay(self) -> list[tuple[Tensor, Tensor]]:
        """(logits then, logits now) of every call; caches are made anew and continued as they were."""
        caches: dict[int, Any] = {}
        out = []
        for args, kwargs, cache, logits in self.calls:
            given = kwargs.get("past_key_values")
            if given is not None:
                kwargs = kwargs | {"past_key_values": caches.get(id(given))}
            again = self.model(*args, **kwargs)
            if cache is not None:
                caches[id(cache)] = again.past_key_values
            out.append((logits, again.logits))
        return out


@law(
    "probe",
    "A probe reads: every output of the model while it is watched is, bit for bit, what it is when nobody looks. Measure with "
    "qkv.hosts.observe, and never with another attention implementation.",
)
def changes_no_output_bit(case: Case) -> None:
    """In float32, where another order of the same sums would show."""
    model = decoder(case.device, dtype=torch.float32)
    with Tape(model) as tape:
        _run(case, model)
    expect(tape.calls, "the probe never ran the model")
    for i, (then, now) in enumerate(tape.replay()):
        same(then, now, f"logits of call {i}")


@law(
    "probe",
    "After a measurement the model is as before: weights, modules, hooks, attributes, configuration, training mode, gradients.",
)
def leaves_the_model_alone(case: Case) -> None:
    """Also when the measurement fails half way."""
    model = decoder(case.device)
    before, values = snapshot(model), weights(model)
    _run(case, model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    try:
        case.method.run(model, **case.spec.example(model), progress=interrupt)
    except KeyboardInterrupt:
        pass
    else:
        expect(False, "`progress` was never called")
    after = snapshot(model)
    for what, value in before.items():
        expect(after[what] == value, f"the model's {what} changed")
    for name, value in weights(model).items():
        same(value, values[name], name)


def _measured(case: Case, scene: Scene) -> HeadTable:
    from qkv.testing._planted import scripted

    groups = scene.maps.shape[1] // KV_HEADS
    model: Any = scripted(scene.maps, scene.tokens, kv_heads=KV_HEADS)
    if scene.edit is not None:
        scene.edit(model)
    model = model.to(case.device)
    table = case.method.run(model, **scene.inputs).table
    want = tuple(scene.want.shape)
    if table.unit == "kv_head":
        want = (want[0], want[1] // groups)
    expect(tuple(table.values.shape) == want, f"the table has shape {tuple(table.values.shape)}, expected {want}")
    return table


def _wanted(scene: Scene, table: HeadTable) -> Tensor:
    if table.unit == "head":
        return scene.want
    return scene.want.reshape(scene.want.shape[0], -1, scene.want.shape[1] // KV_HEADS).amax(-1)


@law("probe", "A head that does what the probe looks for, wherever it is planted, comes out on top, and no other does.")
def finds_a_planted_head(case: Case) -> None:
    """Three places drawn at random, and the corners."""
    rng = case.draw()
    places = [(0, 0), (LAYERS - 1, HEADS - 1)]
    places += [(int(rng.integers(1, high=LAYERS)), int(rng.integers(1, high=HEADS))) for _ in range(3)]
    for layer, head in places:
        table = _measured(case, case.spec.planted(layer, head, LAYERS, HEADS))
        place = (layer, head // (HEADS // KV_HEADS)) if table.unit == "kv_head" else (layer, head)
        best = table.top(1)
        expect(place in best, f"planted at {layer}.{head}, found {best}: {table}")
        others = table.values.flatten().sort(descending=True).values
        expect(bool(others[0] > others[1]), f"planted at {layer}.{head}, but others score as high: {table}")


@law(
    "probe",
    "On known attention maps the scores are those that follow from the definition, not merely in the right order.",
)
def known_maps_give_known_scores(case: Case) -> None:
    """Every scene that the spec names, and the planted one."""
    for scene in (case.spec.planted(1, 1, LAYERS, HEADS), *case.spec.known()):
        table = _measured(case, scene)
        close(table.values, _wanted(scene, table), atol=scene.atol, what=f"scores of `{scene.says}`")


@law(
    "probe",
    "A result is plain data: JSON without NaN, with a table per head of the model, and the table survives the round trip.",
)
def result_is_data(case: Case) -> None:
    """Shapes are those of the model."""
    result = _run(case, decoder(case.device))
    expect(isinstance(result, Result), f"{type(result).__name__} lacks table, to_dict, save or plot")
    try:
        text = json.dumps(result.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        expect(False, f"to_dict is not JSON: {error}")
        return
    expect(isinstance(json.loads(text), dict), "to_dict must be an object")
    table = result.table
    want = (5, 3 if table.unit == "kv_head" else 6)
    expect(tuple(table.values.shape) == want, f"the table has shape {tuple(table.values.shape)}, the model {want}")
    expect(
        HeadTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table, "the table changes when saved and read"
    )


@law(
    "probe",
    "Two measurements of one model on the same inputs agree to the last bit; draw nothing without a seed of your own.",
)
def deterministic(case: Case) -> None:
    """The whole result, as data."""
    first, second = (_run(case, decoder(case.device)) for _ in range(2))
    expect(first.to_dict() == second.to_dict(), "two measurements of one model differ")
