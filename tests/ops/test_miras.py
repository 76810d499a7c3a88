"""Miras: special cases, the chunk schedule, hand-written gradients, the presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.core.errors import InvalidParameter
from qkv.ops import miras
from qkv.ops.miras import Rule, faded, memora, moneta, retained, slope, yaad
from qkv.testing import close

B, H, N, D, E = 2, 2, 23, 5, 4


def _draw() -> tuple[list[torch.Tensor], dict[str, Any]]:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=rng, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(B, H, N, D), draw(B, H, N, D), draw(B, H, N, E)
    return [q, F.normalize(k, dim=-1), v], {
        "log_decay": F.logsigmoid(draw(B, H, N) + 2),
        "eta": 0.3 * draw(B, H, N).sigmoid(),
    }


def test_product_loss_is_gated_linear_attention() -> None:
    (q, k, v), gates = _draw()
    want = qkv.attention(q, k, v * gates["eta"].unsqueeze(-1), method="gla", log_decay=gates["log_decay"], scale=1.0)
    for size in (1, 4, 16):
        got = qkv.attention(q, k, v, method=f"miras:loss=dot,normalise=false,chunk_size={size}", **gates)
        close(got, want, rtol=1e-9, what=f"chunks of {size}")


@pytest.mark.parametrize("first", [True, False])
def test_squared_loss_is_the_delta_rule(first: bool) -> None:
    (q, k, v), gates = _draw()
    state, outs = torch.zeros(B, H, E, D, dtype=torch.float64), []
    for t in range(N):
        key, rate = k[:, :, t, None, :], 2 * gates["eta"][:, :, t, None, None]
        alpha = gates["log_decay"][:, :, t, None, None].exp()
        eye = torch.eye(D, dtype=torch.float64)
        forget = alpha * (eye - rate * key.mT @ key) if first else alpha * eye - rate * key.mT @ key
        state = state @ forget + rate * v[:, :, t, :, None] @ key
        outs.append((state @ q[:, :, t, :, None])[..., 0])
    setting = f"miras:loss=l2,chunk_size=1,normalise=false,retain_first={str(first).lower()}"
    close(qkv.attention(q, k, v, method=setting, **gates), torch.stack(outs, 2), rtol=1e-9, what="delta rule")


@pytest.mark.parametrize("preset", [moneta, yaad, memora])
def test_chunks_freeze_the_reference(preset) -> None:
    """Chunks equal a loop with a frozen reference, and are another function than single tokens."""
    (q, k, v), gates = _draw()
    by_four, by_one = (preset(chunk_size=c)(q, k, v, **gates) for c in (4, 1))
    close(by_four, preset(chunk_size=4)(q, k, v, form="reference", **gates), rtol=1e-9, what="chunks of 4")
    assert (by_four - by_one).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["dot", "l2", "lp", "huber"])
def test_hand_gradient_is_that_of_the_loss(loss: str) -> None:
    rng = torch.Generator().manual_seed(4)
    memory = torch.randn(E, D, generator=rng, dtype=torch.float64).requires_grad_()
    k, v = (torch.randn(w, generator=rng, dtype=torch.float64) for w in (D, E))
    e, delta = memory @ k - v, torch.tensor([0.5], dtype=torch.float64)
    size = (e * e).sum().sqrt()
    value = {
        "dot": -(v * (memory @ k)).sum(),
        "l2": (e * e).sum(),
        "huber": delta * (size - delta / 2) if size > delta else (e * e).sum() / 2,
        "lp": (e.abs() ** 3).sum(),
    }[loss]
    (want,) = torch.autograd.grad(value.sum(), memory)
    got = slope((memory @ k).detach(), v, torch.zeros(1, dtype=torch.float64), delta, Rule(loss=loss))[:, None] * k  # type: ignore[arg-type]
    tolerance = 0.05 if loss == "lp" else 1e-9  # the p-norm is smoothed where e is small
    close(got, want, rtol=tolerance, atol=tolerance, what=loss)


def test_storing_a_pair() -> None:
    """One step of eta 1/2 stores a pair of a key of length 1; smaller steps come closer each time."""
    (_, k, v), _ = _draw()
    k, v = k[:, :, :1].expand(B, H, N, D), v[:, :, :1].expand(B, H, N, E)
    keep = torch.zeros(B, H, N, dtype=torch.float64)
    at_once = qkv.attention(k, k, v, method="miras:loss=l2,chunk_size=1", log_decay=keep, eta=keep + 0.5)
    close(at_once, v, rtol=1e-9, what="stored by one step")
    slowly = qkv.attention(k, k, v, method="miras:loss=l2,chunk_size=1", log_decay=keep, eta=keep + 0.05)
    errors = (slowly - v).norm(dim=-1)
    assert (errors[:, :, 1:] < errors[:, :, :-1]).all()


def test_yaad_with_a_wide_huber_is_the_squared_loss() -> None:
    (q, k, v), gates = _draw()
    wide = torch.full((B, H, N), 1e9, dtype=torch.float64)
    got, want = yaad()(q, k, v, delta=wide, **gates), qkv.attention(q, k, v, method="miras:loss=l2,half=true", **gates)
    close(got, want, rtol=1e-9, what="half the squared loss")
    u = slope(100 * v, 0 * v, torch.zeros(1), torch.full((B, H, N, 1), 0.7, dtype=torch.float64), Rule())
    close(u.norm(dim=-1), torch.full((B, H, N), 0.7, dtype=torch.float64), rtol=1e-9, what="bounded by delta")


def test_memora_stays_on_the_simplex_and_moneta_scales() -> None:
    (q, k, v), gates = _draw()
    _, state = memora(chunk_size=1)(q, k, v, return_state=True, **gates)
    memory = state["frozen"]
    assert (memory >= 0).all()
    close(memory.sum(-1), torch.ones(B, H, E, dtype=torch.float64), rtol=1e-9, what="rows of Memora")
    still: dict[str, Any] = {
        "log_decay": torch.zeros(B, H, N, dtype=torch.float64),
        "eta": torch.zeros(B, H, N, dtype=torch.float64),
    }
    _, kept = memora(chunk_size=1)(q, k, v, initial_state=state, return_state=True, **still)
    close(kept["frozen"], memory, rtol=1e-9, what="alpha 1, eta 0")
    a = torch.randn(E, D, dtype=torch.float64)
    rule = Rule(retention="norm", norm_power=4.0)
    close(retained(5 * a, rule), retained(a, rule) / 5, rtol=1e-9, what="the 1/s law of q = 4")
    close(retained(a, rule._replace(norm_power=2.0)), a, rtol=1e-12, what="q = 2 keeps the matrix")


def test_bad_settings_are_refused() -> None:
    for setting in ("loss_power=0.5", "norm_power=1.5", "chunk_size=0", "loss=l3"):
        with pytest.raises(InvalidParameter, match=setting.split("=")[0]):
            qkv.method(f"miras:{setting}")


@pytest.mark.parametrize("c", [1, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("wide", [True, False])
def test_decays_by_halves_are_those_written_out(c: int, wide: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=rng, dtype=torch.float64)  # noqa: E731
    scores, u = draw(B, H, c, c), draw(B, H, c, E)
    decay = -20 * draw(B, H, c, E if wide else 1).abs()
    decay[:, :, ::3] = 0.0  # strong decays next to none
    total = decay.cumsum(2)
    want = torch.zeros_like(u)
    for t in range(c):
        for i in range(t + 1):
            want[:, :, t] += scores[:, :, t, i, None] * decay[:, :, i + 1 : t + 1].sum(2).exp() * u[:, :, i]
    close(faded(scores, u, total), want, rtol=1e-9)


def test_a_border_in_the_wrong_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: halves that meet with the decay of one token too few."""

    def wrong(scores: torch.Tensor, u: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        moved = torch.cat((total[..., :1, :], total[..., :-1, :]), -2)
        return faded(scores, u, moved)

    (q, k, v), gates = _draw()
    want = yaad(chunk_size=16)(q, k, v, form="reference", **gates)
    close(yaad(chunk_size=16)(q, k, v, **gates), want, rtol=1e-9)
    monkeypatch.setattr(miras, "faded", wrong)
    with pytest.raises(AssertionError):
        close(yaad(chunk_size=16)(q, k, v, **gates), want, rtol=1e-9)
