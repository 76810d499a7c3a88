"""Broken conversions that the laws must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qkv.convert import transmla
from qkv.convert.lolcats import LoLCATs
from qkv.convert.transmla import TransMLA
from qkv.testing import mutant


def built(change: Callable[[dict[str, nn.Module], Any], None]) -> type[TransMLA]:
    """TransMLA whose finished modules are tampered with: ``change(modules, model)``."""

    def build(self: TransMLA, model: Any, sites: Any, data: Any) -> Any:
        modules, notes = TransMLA.build(self, model, sites, data)
        change(modules, model)
        return modules, notes

    return mutant(TransMLA, build=build)


def each(change: Callable[[Any], Any]) -> type[TransMLA]:
    """The same, one module at a time."""
    return built(lambda modules, model: [change(m) for m in modules.values()] and None)


def fed(change: Callable[[Any], Any]) -> type[TransMLA]:
    """TransMLA that sees other calibration data."""

    def build(self: TransMLA, model: Any, sites: Any, data: Any) -> Any:
        return TransMLA.build(self, model, sites, change(data))

    return mutant(TransMLA, build=build)


def based(make: Callable[[torch.Tensor, int], torch.Tensor]) -> type[TransMLA]:
    """TransMLA on another basis: ``make(T, head width)``."""

    def parts(self: TransMLA, site: Any, module: Any, moments: Any, scale: float, fold: int, basis: Any = None) -> Any:
        g, d = site.kv_heads, site.head_dim
        n = g * d
        t = transmla.components(transmla.rorope(moments.kv[:n, :n], g, d, fold), g, d, fold, self.rope_dim)
        return TransMLA.assemble(self, site, module, moments, scale, fold, make(t, d))

    return mutant(TransMLA, assemble=parts)


def interleaved(t: torch.Tensor, d: int) -> torch.Tensor:
    order = torch.arange(t.shape[0]).unflatten(0, (2, -1)).T.flatten()  # (2, P) to (P, 2)
    return t[order]


def random_orthogonal(t: torch.Tensor, d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(0))).Q


def scaled(name: str, factor: float) -> Callable[[Any], Any]:
    def change(module: Any) -> Any:
        getattr(module, name).weight.data.mul_(factor)

    return change


def no_bias(module: Any) -> None:
    if module.kv_a_proj_with_mqa.bias is not None:
        module.kv_a_proj_with_mqa.bias.data.zero_()


def noise(module: Any) -> None:
    module.kv_b_proj.weight.data.add_(1e-9 * torch.randn_like(module.kv_b_proj.weight))


def shared(modules: dict[str, nn.Module], model: Any) -> None:
    for name, module in modules.items():
        module.o_proj = model.get_submodule(name).o_proj


def swollen(modules: dict[str, nn.Module], model: Any) -> None:
    model.model.norm.weight.data.mul_(1.001)


def forgotten(modules: dict[str, nn.Module], model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *a: None)


def asleep(modules: dict[str, nn.Module], model: Any) -> None:
    model.eval()


def mismatched(module: Any) -> None:
    module.kv_b_proj.weight.data.copy_(module.kv_b_proj.weight.data.flip(-1).clone())


def absorbs_wrong(module: Any) -> None:
    absorb = module.absorb
    module.absorb = lambda q: absorb(q) * 1.001


def memory(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Tamper with every cache layer that the module makes."""

    def on(module: Any) -> None:
        make = module.qkv_cache_layer

        def layer() -> Any:
            out = make()
            change(out.memory)
            return out

        module.qkv_cache_layer = layer

    return on


def never_reorders(store: Any) -> None:
    store.select = lambda rows: None


def never_crops(store: Any) -> None:
    store.crop = lambda tokens: setattr(store, "seen", store.seen)


def lies(store: Any) -> None:
    true = store.bytes
    store.bytes = lambda: true() // 2


def counts_latents(store: Any) -> None:
    store.full_width = 5


def frozen(module: Any) -> None:
    module.kv_a_proj_with_mqa.requires_grad_(False)


def coarse(module: Any) -> None:
    for p in module.parameters():
        p.data = p.data.to(torch.float8_e4m3fn).to(p.dtype)


def off_the_record(module: Any) -> None:
    module.register_forward_hook(lambda m, args, out: (out[0] * 1.1, *out[1:]))


def without_mask(data: Any) -> Any:
    return [{"input_ids": b["input_ids"]} for b in data]


def made_up(data: Any) -> Any:
    return data or [{"input_ids": torch.arange(1, 60).unsqueeze(0)}]


def promise_less(x: Any) -> dict[str, Any]:
    return dict(TransMLA.spec.exact(x)) | {"kv_rank": 3}  # type: ignore[misc]


def linearised(change: Callable[[Any], None]) -> type[LoLCATs]:
    """LoLCATs whose finished modules are tampered with, one at a time."""

    def build(self: LoLCATs, model: Any, sites: Any, data: Any) -> Any:
        modules, notes = LoLCATs.build(self, model, sites, data)
        for module in modules.values():
            change(module)
        return modules, notes

    return mutant(LoLCATs, build=build)


def hoards(store: Any) -> None:
    store.recording = True  # keeps every token until somebody settles it


def undoes(module: Any) -> None:
    with torch.no_grad():
        module.map_q.copy_(-module.map_q)


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "exact_where_claimed": [
        ("interleaved_pairs", based(interleaved)),
        ("basis_without_frequencies", based(random_orthogonal)),
        ("softmax_scale", each(scaled("q_proj", 1.001))),
        ("bias_left_behind", each(no_bias)),
        ("promise", mutant(TransMLA, exact=promise_less)),
    ],
    "touches_only_its_sites": [("norm", built(swollen)), ("hook", built(forgotten)), ("mode", built(asleep))],
    "revert_restores": [("shared_output", built(shared))],
    "asks_for_data": [("made_up_data", fed(made_up))],
    "ignores_padded_data": [("mask_dropped", fed(without_mask))],
    "deterministic": [("noise", each(noise))],
    "error_falls": [("basis_and_inverse", each(mismatched))],
    "prefill_equals_steps": [("absorbed_form", each(absorbs_wrong))],
    "generates": [("beams", each(memory(never_reorders))), ("lookup", each(memory(never_crops)))],
    "bytes_are_held": [("half", each(memory(lies))), ("full", each(memory(counts_latents)))],
    "memory_is_constant": [("hoarding", linearised(memory(hoards)))],
    "training_helps": [("undone", linearised(undoes))],
    "trains": [("frozen", each(frozen))],
    "low_precision": [("eight_bits", each(coarse))],
    "survives_saving": [("factor_in_a_hook", each(off_the_record))],
    "survives_a_fresh_process": [("factor_in_a_hook", each(off_the_record))],
}
