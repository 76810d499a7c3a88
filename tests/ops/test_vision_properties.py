"""Agent, SOFT, Hydra and HyperAttention on drawn shapes, head groupings, settings and paddings, against their definitions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qkv
from qkv.testing import close

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
shapes = st.fixed_dictionaries({
    "b": st.integers(1, 3), "g": st.integers(1, 2), "r": st.integers(1, 3), "n": st.integers(1, 40), "m": st.integers(1, 50),
    "d": st.integers(1, 6), "e": st.integers(1, 6), "seed": st.integers(0, 999), "causal": st.booleans(), "padded": st.booleans(),
})  # fmt: skip
small = st.integers(1, 9)


def _check(s: dict[str, Any], method: Any, *, cross: bool, extras: dict[str, str], sizes: dict[str, int]) -> None:
    """The fast form against the definition, at the real queries; everything else must be finite."""
    rng, causal = torch.Generator().manual_seed(s["seed"]), s["causal"]
    n = s["n"]
    m = max(n, s["m"]) if cross and causal else s["m"] if cross or (method.spec.cross and not causal) else n
    axes = {"b": s["b"], "h": s["g"] * s["r"], "g": s["g"], "n": n, "m": m, "d": s["d"], "e": s["e"]} | sizes

    def normal(letters: str) -> torch.Tensor:
        return torch.randn([axes[c] for c in letters], generator=rng, dtype=torch.float64)

    call: dict[str, Any] = {name: normal(letters) for name, letters in extras.items()} | {"causal": causal}
    call |= {name: call[name].abs() for name in ("dt", "back_dt") if name in call}
    call |= {"rate": -call["rate"].abs()} if "rate" in call else {}
    real = torch.ones(s["b"], n, dtype=torch.bool)
    if s["padded"]:
        call["padding"] = torch.rand(s["b"], m, generator=rng) < torch.rand(s["b"], 1, generator=rng) * 1.5
        real = call["padding"][:, m - n :] if causal or n == m else real
    q, k, v = normal("bhnd"), normal("bgmd"), normal("bgme")
    got, want = method(q, k, v, **call), method(q, k, v, form="reference", **call)
    assert got.isfinite().all()
    keep = real[:, None, :, None].expand_as(got)
    if keep.any():
        close(got[keep], want[keep], rtol=1e-9, atol=1e-9)


@EXAMPLES
@given(shapes, small, small, small, st.integers(1, 5), st.sampled_from([0, 2, 5]), st.sampled_from(["auto", "bucket"]))
def test_hyperattention(s: Any, least: int, block: int, sample: int, bits: int, always: int, match: str) -> None:
    method = qkv.method("hyperattention", min_seq_len=least, block_size=block, sample_size=sample, lsh_num_projs=bits,
                        always_keys=always, match=match, seed=s["seed"])  # fmt: skip
    _check(s, method, cross=True, extras={}, sizes={})


@EXAMPLES
@given(shapes, small, small, st.booleans())
def test_agent(s: Any, pooled: int, given_: int, biased: bool) -> None:
    fixed = s["causal"] or biased
    extras = {"agents": "bhsd", "bias_keys": "hsm", "bias_queries": "hns"} if fixed else {}
    method = qkv.method("agent", num_agents=pooled, chunk_size=8, sub_chunk=4)
    _check(s, method, cross=False, extras=extras, sizes={"s": given_})


@EXAMPLES
@given(shapes, st.integers(1, 5), st.integers(1, 4), small, st.sampled_from(["plain", "symmetric"]))
def test_soft(s: Any, pooled: int, given_: int, chunk: int, normalise: str) -> None:
    method = qkv.method("soft", num_landmarks=pooled, normalise=normalise, chunk_size=chunk, newton_iters=30)
    _check(s, method, cross=False, extras={"landmarks": "bgsd"} if s["causal"] else {}, sizes={"s": given_})


@EXAMPLES
@given(shapes, st.integers(1, 20), st.booleans())
def test_hydra(s: Any, chunk: int, own: bool) -> None:
    extras = {"dt": "bhn", "rate": "h", "diagonal": "bhn"}
    extras |= {"back_q": "bhnd", "back_k": "bgmd", "back_dt": "bhn"} if own else {}
    _check(s | {"causal": False}, qkv.method("hydra", chunk_size=chunk), cross=False, extras=extras, sizes={})
