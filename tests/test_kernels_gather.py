"""The kernels of sparse reads against plain torch: through Triton's interpreter anywhere, on the device where there is one."""

from __future__ import annotations

import pytest
import torch

from interpreter import DEVICE, direct, interpreted

triton = pytest.importorskip("triton")


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@direct
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 48, 32, 32, 4, 5), (1, 4, 4, 64, 16, 24, 1, 17), (2, 8, 2, 130, 64, 64, 5, 9)], ids=str
)
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_gather_attention_reads_what_is_listed(shape: tuple[int, ...], heads: str) -> None:
    from qkv.core.attend import attend
    from qkv.kernels.gather import gather_attention

    b, h, g, s, d, e, c, count = shape
    a = g if heads == "kv" else h
    q, k, v = rand(b, h, 1, d), rand(b, g, s, d, seed=1), rand(b, g, s, e, seed=2)
    draw = torch.Generator().manual_seed(3)
    position = torch.randint(s // 2, s, (b,), generator=draw).to(DEVICE, torch.int32)
    pages = s // c
    index = torch.stack([torch.randperm(pages, generator=draw)[:count] for _ in range(b * a)]).reshape(b, a, 1, count)
    index[..., -2:] = -1
    if b > 1:
        index[1, 0] = -1  # nothing at all for one head
    index = index.to(DEVICE, torch.int32)
    mask = torch.zeros(b, a, s, dtype=torch.bool, device=DEVICE)
    for row in range(b):
        for head in range(a):
            for page in index[row, head, 0].tolist():
                if page >= 0:
                    mask[row, head, page * c : (page + 1) * c] = True
    mask &= torch.arange(s, device=DEVICE) <= position[:, None, None]
    used = mask.reshape(b, g, a // g, s).any(2)
    k[~used], v[~used] = float("nan"), float("nan")  # what was not listed must not be read
    plain = [torch.nan_to_num(x).double() for x in (k, v)]
    want = attend(q.double(), *plain, mask=mask.unsqueeze(2))
    for splits in (1, 3):
        out, lse = gather_attention(q, k, v, index, position, block=c, scale=d**-0.5, splits=splits)
        torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-6)


@direct
@pytest.mark.parametrize(
    "shape", [(2, 2, 37, 1, 9), (3, 1, 70, 4, 40), (1, 1, 32, 1, 32), (2, 1, 20, 3, 1), (1, 1, 1100, 1, 30)], ids=str
)
@pytest.mark.parametrize("kind", ["normal", "ties", "extremes"])
@pytest.mark.parametrize("part", [(4096, 16384), (64, 256), (32, 64)], ids=str)
def test_select_is_the_exact_top_k(
    shape: tuple[int, ...], kind: str, part: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a glance, narrowed first, and counted in parts."""
    from qkv.kernels import gather
    from qkv.kernels.gather import select

    if part[0] == 32 and (kind == "normal" or shape[2] != 70):
        pytest.skip("counting in parts is shown by one shape; through the interpreter the others take minutes")
    monkeypatch.setattr(gather, "PART", part[0])
    monkeypatch.setattr(gather, "WIDE", part[1])
    monkeypatch.setattr(gather, "COUNTED", part[0])
    b, a, p, c, count = shape
    worth = rand(b, a, 1, p)
    if kind == "ties":
        worth = (worth * 1.5).round()
    if kind == "extremes":
        worth[..., ::5] = float("nan")
        worth[..., 1::7] = float("inf")
        worth[..., 2::7] = -float("inf")
        worth[..., 3::11] = -0.0
    draw = torch.Generator().manual_seed(1)
    position = torch.randint(p * c // 2, p * c, (b,), generator=draw).to(DEVICE, torch.int32)
    if b > 2:
        position[1] = -1
    keep = torch.randint(1, count + 1, (b,), generator=draw).to(DEVICE, torch.int32)
    for k, sinks, recent in ((None, 0, 0), (keep, 0, 0), (None, 5, 3 * c + 1)):
        index = select(worth, position, count, block=c, keep=k, sinks=sinks, recent=recent)
        for row in range(b):
            newest = int(position[row])
            for head in range(a):
                got = [x for x in index[row, head, 0].tolist() if x >= 0]
                if newest < 0:
                    assert not got
                    continue
                own, most = newest // c, count if k is None else int(k[row])
                x = worth[row, head, 0, :own].nan_to_num(-float("inf"), float("inf"), -float("inf")).clone()
                firm = [j for j in range(own) if j * c < sinks or (recent and (j + 1) * c > newest + 1 - recent)]
                if own:
                    x[firm] = 1e38 if kind != "extremes" else float("inf")
                want = min(most - 1, own)
                assert got[0] == own and len(got) == 1 + want and got[1:] == sorted(set(got[1:]))
                if want and kind != "extremes":
                    assert torch.equal(x[got[1:]].sort().values, x.topk(want).values.sort().values)
                    assert set(firm[:want]) <= set(got) or len(firm) > want
                    if kind == "ties" and not firm:  # the lower number wins
                        low = x.topk(want).values.min()
                        tied = [j for j in range(own) if x[j] == low]
                        mine = [j for j in got[1:] if x[j] == low]
                        assert mine == tied[: len(mine)]
                elif want:
                    assert x[got[1:]].min() >= x.topk(want).values.min()


@direct
@pytest.mark.parametrize("per_head", [False, True])
def test_page_scores_are_the_bounds(per_head: bool) -> None:
    from qkv.kernels.gather import page_scores

    b, h, g, p, c, d = 2, 6, 3, 37, 4, 24
    q, bounds = rand(b, h, 1, d), torch.cat((rand(b, g, p, d, seed=1) + 1, rand(b, g, p, d, seed=1) - 1), -1)
    position = torch.tensor([p * c - 1, 11], dtype=torch.int32, device=DEVICE)
    got = page_scores(q, bounds, position, block=c, per_head=per_head)
    each = torch.maximum(
        q.reshape(b, g, 2, 1, d) * bounds[:, :, None, :, :d], q.reshape(b, g, 2, 1, d) * bounds[:, :, None, :, d:]
    ).sum(-1)  # [B, G, R, P]
    want = each.reshape(b, h, p) if per_head else each.amax(2)
    for row in range(b):
        own = int(position[row]) // c
        torch.testing.assert_close(got[row, :, 0, :own], want[row, :, :own], rtol=0, atol=3e-5)


@direct
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("r", [3, 8])
def test_label_scores_are_those_of_the_method(bits: int, r: int) -> None:
    from qkv.caches.double_sparsity import DoubleSparsity, packed, quantise
    from qkv.kernels.gather import label_scores

    b, h, g, m, d = 2, 6, 3, 300, 24
    q, labels = rand(b, h, 1, d), rand(b, g, m, r, seed=1)
    channels = torch.stack([torch.randperm(d)[:r] for _ in range(b * g)]).reshape(b, g, r).to(DEVICE)
    position = torch.tensor([m - 1, 30], dtype=torch.int32, device=DEVICE)
    if bits == 16:
        got = label_scores(q, channels, labels, position)
        features = {"labels": labels}
    else:
        codes, step, low = quantise(labels, bits)
        features = {"codes": packed(codes, bits), "step": step.half(), "low": low.half()}
        got = label_scores(
            q, channels, features["codes"], position, bits=bits, step=features["step"], low=features["low"]
        )
    want = DoubleSparsity(label_bits=bits).scores(q, channels, features)
    for row in range(b):
        n = int(position[row])
        torch.testing.assert_close(got[row, :, :, :n], want[row, :, :, :n], rtol=0, atol=3e-5)


@direct
@pytest.mark.parametrize(
    "name",
    [
        "quest:budget=12,block_size=4", "quest:budget=0.4,block_size=3,share=query_head", "quest:budget=1.0",
        "double-sparsity:budget=7,channel_factor=2,samples=5",
        "tidaldecode:budget=6,dense_layers=0", "quest:dense_layers=9",
    ],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_step_is_a_plain_step(name: str, padded: bool) -> None:
    """Prompt, static steps, and a plain step after them, against plain steps in torch."""
    import qkv
    from qkv.core.cache import Geometry, Now, Rope, Step

    b, h, g, d, t, new = 2, 2, 1, 16, 15, 3
    rope = Rope(100.0 ** -(torch.arange(d // 2, dtype=torch.float32) / (d // 2)))
    geometry = Geometry(h, g, d, d, layer=2, layers=9, rope=rope)
    a, twin = (qkv.method(name).layer(geometry) for _ in range(2))
    a.reserve(t + new + 2)
    q, k, v = (rand(b, n, t + new + 1, d, seed=n) for n in (h, g, g))
    padding = torch.ones(b, t + new + 1, dtype=torch.bool, device=DEVICE)
    if padded:
        padding[1, :4] = False
    position = (padding.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~padding, -1)
    start = (~padding).sum(-1, dtype=torch.int32) if padded else None

    def plain(layer, i: int, n: int) -> torch.Tensor:
        at = slice(i, i + n)
        step = Step(position[:, at], d**-0.5, padding[:, : i + n] if padded else None)
        return layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step)

    plain(a, 0, t), plain(twin, 0, t)
    held = a.buffers()
    for i in range(t, t + new):
        now = Now(
            torch.tensor([i], device=DEVICE), torch.tensor([i + 1], dtype=torch.int32, device=DEVICE),
            position[:, i : i + 1].contiguous(), start,
        )  # fmt: skip
        got = a.step(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], d**-0.5, now)
        torch.testing.assert_close(got, plain(twin, i, 1), rtol=0, atol=3e-6)
    assert all(x is y for x, y in zip(a.buffers(), held, strict=True))
    torch.testing.assert_close(plain(a, t + new, 1), plain(twin, t + new, 1), rtol=0, atol=3e-6)
    assert torch.equal(a.positions(), twin.positions()) and a.seen == twin.seen
