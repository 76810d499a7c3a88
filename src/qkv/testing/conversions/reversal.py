"""What a conversion leaves alone, gives back, and brings back from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv.core import registry
from qkv.core.errors import SavedDataError
from qkv.testing._law import Case, close, expect, finite, law, refuses, same
from qkv.testing.conversions._source import (
    LAYERS,
    converted,
    held_out,
    is_first,
    logits,
    names,
    small,
    snapshot,
    source,
    texts,
)


@law(
    "conversion",
    "A conversion must change its own sites and nothing else: every other parameter stays the same object with the same bits. "
    "Usual causes: folding weights into the residual stream, forgotten hooks, a mode or flag not put back.",
)
def touches_only_its_sites(case: Case) -> None:
    """The last layer alone is converted; the first has a submodule in training mode, which must stay so."""
    model = source(seed=case.seed, device=case.device)
    model.model.layers[0].mlp.train()
    before, at = snapshot(model), f"{names(model)[-1]}."
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    batch = held_out(case)[0]
    with qkv.applied(model, small(case, model), where=[LAYERS - 1], data=texts(case, 1)):
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, (x, copied) in before.items():
            if not name.startswith(at):
                expect(after.get(name) is x, f"{name} is another object after the conversion")
                same(x, copied, name)
        expect(not any(n not in before for n in after if not n.startswith(at)), "parameters appeared outside the sites")
        for name, module in model.named_modules():
            if not f"{name}.".startswith(at) and name in modes:
                expect(module.training == modes[name], f"{name or 'the model'} was left in another mode")
                extra = len(module._forward_hooks) + len(module._forward_pre_hooks) - hooks[name]
                expect(extra <= (name == "model"), f"{name or 'the model'} was left with {extra} more hooks")
        finite(logits(model, batch))


@law(
    "conversion",
    "Revert gives back the very modules: same objects, same bits, same logits, also after the converted layer was trained. "
    "Usual causes: parameters shared between the source module and the new one.",
)
def revert_restores(case: Case) -> None:
    """Every new parameter is changed in place before the revert."""
    model = source(seed=case.seed, device=case.device)
    before, modules, batch = snapshot(model), dict(model.named_modules()), held_out(case)[0]
    want = logits(model, batch)
    with converted(case, model, small(case, model)):
        with torch.no_grad():
            for name in names(model):
                for parameter in model.get_submodule(name).parameters():
                    parameter.add_(0.1)
    expect({n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}, "modules differ")
    for name, (x, copied) in before.items():
        expect(
            {**dict(model.named_parameters()), **dict(model.named_buffers())}[name] is x, f"{name} is another object"
        )
        same(x, copied, name)
    same(logits(model, batch), want, "logits after revert")


@law(
    "conversion",
    "Saved and loaded onto the same base it is the same model, bit for bit; missing, unexpected or misshapen tensors and another "
    "base are errors. Usual causes: sizes or factors kept on the module but neither in its state nor in the notes.",
)
def survives_saving(case: Case) -> None:
    """Logits and generated tokens; then seven ways to damage the folder."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[1]
    with tempfile.TemporaryDirectory() as folder, converted(case, model, small(case, model)):
        want = logits(model, batch)
        qkv.save(model, Path(folder) / "saved")
        twin = qkv.load(Path(folder) / "saved", model=source(seed=case.seed, device=case.device))
        same(logits(twin, batch), want, "logits of the loaded model")
        again = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        same(twin.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0), again, "its tokens")
        with_other = source(seed=case.seed + 1, device=case.device)
        refuses(SavedDataError, lambda: qkv.load(Path(folder) / "saved", model=with_other), "another base model")
        _damage(case, Path(folder), model)


def _damage(case: Case, folder: Path, model: Any) -> None:
    from qkv.hosts import stack

    manifest, tensors = stack.read_folder(folder / "saved")
    key = sorted(tensors)[0]
    first = tensors[key]
    damaged = {
        "a missing tensor": {k: v for k, v in tensors.items() if k != key},
        "an unexpected tensor": tensors | {f"{key}.more": first},
        "a tensor of another site": tensors | {"0/nowhere/x": first},
        "a misshapen tensor": tensors | {key: first[..., :-1]},
        "a tensor of whole numbers": tensors | {key: first.to(torch.int64)},
    }
    keep = {k: v for k, v in manifest.items() if k not in ("format", "qkv", "files")}
    for what, wrong in damaged.items():
        stack.write_folder(folder / "damaged", keep, wrong)
        fresh = source(seed=case.seed, device=case.device)
        refuses(SavedDataError, lambda fresh=fresh: qkv.load(folder / "damaged", model=fresh), what)
        expect(not hasattr(fresh, "_qkv"), f"{what}: a refused load left something on the model")
    entry = keep["stack"][0]
    for what, notes in {"no notes": {}, "strange notes": {"sites": dict.fromkeys(names(model), 3)}}.items():
        stack.write_folder(folder / "damaged", keep | {"stack": [entry | {"notes": notes}]}, tensors)
        fresh = source(seed=case.seed, device=case.device)
        refuses(SavedDataError, lambda fresh=fresh: qkv.load(folder / "damaged", model=fresh), what)


_CHILD = """
import json, sys, torch, qkv
from qkv.testing.conversions import logits, source
folder, seed, device, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = qkv.load(folder + "/saved", model=source(seed=seed, device=device))
batch = torch.load(folder + "/batch.pt", weights_only=True)
torch.save(logits(model, batch), folder + "/logits.pt")
"""


@law(
    "conversion",
    "Another process that has only the base and the saved folder gets the same model. Usual cause: state that lives in the "
    "process that converted.",
    applies=lambda case: case.spec.id in registry.ids() and is_first(case),
    expensive=True,
)
def survives_a_fresh_process(case: Case) -> None:
    """The other process draws the base from its seed and loads the folder onto it."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[1]
    with tempfile.TemporaryDirectory() as folder, converted(case, model, small(case, model)):
        qkv.save(model, Path(folder) / "saved")
        torch.save(batch, Path(folder) / "batch.pt")
        given = json.dumps([folder, case.seed, case.device, torch.get_num_threads()])
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, given], capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        expect(done.returncode == 0, f"the other process failed:\n{done.stderr[-600:]}")
        got = torch.load(Path(folder) / "logits.pt", weights_only=True, map_location=case.device)
        close(got, logits(model, batch), rtol=1e-12, what="logits in another process")
