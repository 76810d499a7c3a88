"""The decayed kernels against float64: through Triton's interpreter on any machine, on the device where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from interpreter import CUDA, DEVICE, HERE, INTERPRETED, direct, interpreted
from qkv.core.errors import InvalidInput, Refused
from qkv.ops._common.decayed import Decayed, decayed_linear_attention

triton = pytest.importorskip("triton")


def test_decayed_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


@pytest.mark.skipif(HERE, reason="the kernel can run here")
def test_a_kernel_that_cannot_run_says_why() -> None:
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(Refused, match="run on CUDA devices; q lies on cpu"):
        decayed_linear_attention(x, x, x, form="triton")
    with pytest.raises(Refused, match="form='fast'"):
        qkv.attention(x, x, x, method="gla", log_decay=-torch.ones(2), form="kernel")


class Case:
    """Random inputs, and the gradients of one loss over outputs and final states."""

    def __init__(
        self, sizes: tuple[int, ...], gate: str, dtype: torch.dtype = torch.float32, strong: bool = False
    ) -> None:
        b, h, g, n, d, e = sizes
        draw = torch.Generator().manual_seed(sum(sizes))
        rand = lambda *s: torch.randn(*s, generator=draw).to(DEVICE)  # noqa: E731
        shape = {"none": None, "h": (h,), "bhn": (b, h, n), "bhnd": (b, h, n, d)}[gate]
        decay = None if shape is None else -rand(*shape).abs() / 2
        if strong and decay is not None:
            decay = torch.where(rand(*decay.shape) < 0, decay, -20.0)
        self.tensors = {"q": rand(b, h, n, d), "k": rand(b, g, n, d), "v": rand(b, g, n, e)}
        self.tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        if decay is not None:
            self.tensors["log_decay"] = decay
        self.state, self.keys = rand(b, h, d, e), rand(b, h, d).abs()
        self.weights = rand(b, h, n, e), rand(b, h, d, e)
        self.keywords: dict = {"scale": 0.3}

    def run(self, form: str, wide: bool) -> dict[str, torch.Tensor]:
        leaves = {n: (x.double() if wide else x).clone().requires_grad_() for n, x in self.tensors.items()}
        done: Decayed = decayed_linear_attention(**leaves, **self.keywords, form=form)  # type: ignore[arg-type]
        loss = sum((x.double() * w).sum() for x, w in zip(done[:2], self.weights, strict=True))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        named = {f"gradient of {n}": x for n, x in zip(leaves, grads, strict=True)}
        return {"out": done.out, "state": done.state} | named

    def agrees(self, tolerance: float) -> None:
        """The kernel against the chunked form in float64; the errors are relative to the norm."""
        got, want = self.run("triton", False), self.run("chunked", True)
        for name, x in want.items():
            assert torch.isfinite(got[name]).all(), name
            assert got[name].shape == x.shape, name
            error = ((got[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item()
            assert error < tolerance, f"{name}: relative error {error:.2e}, at most {tolerance}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens: several of them in a short sequence."""
    if INTERPRETED:
        from qkv.kernels import decayed

        monkeypatch.setattr(decayed, "CHUNK", 16)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 in the interpreter as on a device: rounded to nearest (it cuts), multiplied as numbers (it takes their bits)."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from qkv.kernels import decayed

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def nearest(self: Any, x: Any, kind: Any, *_: Any) -> Any:
        if x.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, x, kind)
        bits = torch.from_numpy(np.array(x.data, dtype=np.float32)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    def multiply(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, nearest)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply)
    monkeypatch.setattr(decayed, "_arithmetic", lambda dtype: decayed._ARITHMETIC[dtype])


SHAPES = [(1, 2, 1, 70, 5, 7), (2, 2, 2, 64, 16, 24), (1, 1, 1, 1, 8, 3)]


@direct
@pytest.mark.parametrize("gate", ["none", "h", "bhn", "bhnd"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_forward_and_every_gradient(sizes: tuple[int, ...], gate: str) -> None:
    """Lengths that are no multiple of the chunk, shared heads, odd widths; start and end states with gradients."""
    case = Case(sizes, gate)
    case.tensors["state"] = case.state
    case.agrees(2e-5)


@direct
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
def test_strong_decay(gate: str) -> None:
    """-20 a step among mild ones, and everywhere: finite, and right."""
    Case((1, 2, 2, 75, 8, 8), gate, strong=True).agrees(1e-4)
    case = Case((1, 1, 1, 75, 8, 8), gate)
    case.tensors["log_decay"].fill_(-20.0)
    case.weights[1].zero_()  # a loss on the state gives gates' gradients of 1e-9 as differences of ones
    case.agrees(1e-4)
    case.tensors["log_decay"].fill_(
        -1.8
    )  # through the middle token of a chunk, with exponents near the largest allowed
    case.agrees(1e-4)
    case.tensors["log_decay"].fill_(-1e4)
    for name, x in case.run("triton", False).items():
        assert torch.isfinite(x).all(), name


@direct
@pytest.mark.parametrize("gate", ["none", "bhn", "bhnd"])
def test_segments_and_tiles_change_nothing(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence cut into segments, and outputs made in several tiles, against float64."""
    from qkv.kernels import decayed

    monkeypatch.setattr(decayed, "CHUNK", 16)
    monkeypatch.setattr(decayed, "_segments", lambda fill, programs, chunks, device: (chunks, 1))
    for name in decayed.LAUNCH:
        monkeypatch.setitem(decayed.LAUNCH[name], "tile", 16)
    case = Case((1, 2, 1, 40, 18, 20), gate)
    case.tensors["state"] = case.state
    case.agrees(2e-5)


@direct
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
def test_parts_of_segments_and_chunks_of_either_kind(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments whose states are summed in two parts; chunks that decay by little, by much, and in one channel alone."""
    from qkv.kernels import decayed

    monkeypatch.setattr(decayed, "_segments", lambda fill, programs, chunks, device: (-(-chunks // 2), 2))
    for name in ("scan", "sum", "each", "weigh"):
        monkeypatch.setitem(decayed.LAUNCH[name], "split", 2)
    case = Case((1, 2, 1, 150, 12, 10), gate)
    case.tensors["state"] = case.state
    decay = case.tensors["log_decay"]
    decay[:, :, 20:50] *= 40.0
    decay.view(1, 2, 150, -1)[:, :, 100, :1] = -70.0
    case.agrees(1e-4)


@direct
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
def test_padding_and_normaliser(gate: str) -> None:
    """Padded tokens leave the state as it is, whatever lies there; the normaliser is the same map of ones."""
    case = Case((2, 2, 1, 21, 8, 8), gate)
    case.tensors["q"], case.tensors["k"] = case.tensors["q"].abs(), case.tensors["k"].abs()
    case.tensors |= {"state": case.state.abs(), "keys": case.keys}
    real = torch.arange(21, device=DEVICE) >= torch.tensor([[5], [0]], device=DEVICE)
    case.keywords |= {"normalise": True, "padding": real}
    case.agrees(2e-5)


@direct
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
def test_low_precision(gate: str, dtype: torch.dtype) -> None:
    """Inputs in 16 bits, sums in float32, outputs in 16 bits, states in float32; scores past float16's range stay finite."""
    case = Case((1, 2, 2, 40, 16, 16), gate, dtype)
    case.agrees(2e-2)
    got = case.run("triton", False)
    assert got["out"].dtype == got["gradient of q"].dtype == dtype and got["state"].dtype == torch.float32
    if dtype == torch.float16:
        q = torch.full((1, 1, 40, 16), 90.0, dtype=dtype, device=DEVICE)
        assert decayed_linear_attention(q, q, q / 9e4, form="triton", scale=1e-3).out.isfinite().all()


@direct
@pytest.mark.usefixtures("short", "rounded")
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
@pytest.mark.parametrize(
    "widths", [(192, 16), (16, 192), *([(256, 256), (100, 20), (20, 100)] if CUDA else [])], ids=str
)
def test_heads_of_very_different_widths(widths: tuple[int, int], gate: str) -> None:
    """In bfloat16, whose tiles may be swizzled in different ways (qkv.kernels.widths)."""
    Case((1, 2, 1, 201 if CUDA else 20, *widths), gate, torch.bfloat16).agrees(3e-2)


@direct
@pytest.mark.usefixtures("short", "rounded")
@pytest.mark.parametrize("gate", ["bhn", "bhnd"])
def test_the_gradient_of_a_decay_keeps_its_bits(gate: str) -> None:
    """Over many chunks, in bfloat16, with a loss on the last state: as near as the other gradients. Sums of dG over the whole
    sequence were up to ten times further away, and further the longer it was."""
    case = Case((1, 1, 1, 4096 if CUDA else 304, 16, 16), gate, torch.bfloat16)
    case.tensors["q"], case.tensors["k"] = (torch.nn.functional.normalize(case.tensors[x], dim=-1) for x in "qk")
    case.agrees(5e-3)


@direct
@pytest.mark.parametrize("gate", ["none", "h", "bhn", "bhnd"])
def test_tokens_one_by_one_are_the_sequence(gate: str) -> None:
    """The fused step, in an empty state and in one that is handed over."""
    case = Case((2, 4, 2, 9, 8, 6), gate)
    how = {"scale": 0.3, "form": "triton"}
    whole = decayed_linear_attention(**case.tensors, **how)  # type: ignore[arg-type]
    state, outs = None, []
    for t in range(9):
        now = {n: x if x.ndim == 1 else x[:, :, t : t + 1] for n, x in case.tensors.items()}
        out, state, _ = decayed_linear_attention(**now, **how, state=state)  # type: ignore[arg-type]
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-5, atol=1e-5)


@direct
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("gate", ["h", "bhnd"])
def test_a_fixed_decay_changes_no_other_gradient(gate: str) -> None:
    """A decay that asks for no gradient gets none; those of q, k, v stay as they are."""
    case = Case((1, 2, 1, 20, 8, 6), gate)
    want = case.run("triton", False)
    leaves = {n: x.clone().requires_grad_(n != "log_decay") for n, x in case.tensors.items()}
    done = decayed_linear_attention(**leaves, **case.keywords, form="triton")  # type: ignore[arg-type]
    loss = sum((x.double() * w).sum() for x, w in zip(done[:2], case.weights, strict=True))
    names = [n for n in leaves if n != "log_decay"]
    for name, x in zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(x, want[f"gradient of {name}"], rtol=1e-6, atol=1e-6)


@direct
@pytest.mark.usefixtures("short")
def test_views_are_read_in_place() -> None:
    """Heads that come out of a projection as a transposed view, and channels that are not next to one another."""
    case = Case((2, 2, 2, 20, 8, 8), "bhnd")
    want = case.run("triton", False)
    case.tensors = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in case.tensors.items()}
    case.tensors["k"] = case.tensors["k"].mT.contiguous().mT
    got = case.run("triton", False)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-6)


@direct
def test_the_op_is_sound_for_torch_library() -> None:
    """Schema, fake tensors and autograd registration of the op, as PyTorch checks them."""
    from qkv.kernels import decayed  # noqa: F401

    case = Case((1, 2, 1, 6, 4, 3), "bhn")
    q, k, v, g = (x.requires_grad_() for x in case.tensors.values())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for decay, state in ((g.unsqueeze(-1), None), (None, case.state)):
        torch.library.opcheck(torch.ops.qkv.decayed, (q, k, v, decay, state, 0.5), test_utils=checks)
        plain = [x if x is None else x.detach() for x in (q, k, v, decay, state)]
        torch.library.opcheck(torch.ops.qkv.decayed_plain, (*plain, 0.5), test_utils=(checks[0], checks[2]))


@direct
@pytest.mark.usefixtures("short")
def test_operators_reach_the_kernel_by_their_spec() -> None:
    case = Case((1, 2, 1, 20, 8, 8), "bhnd")
    q, k, v, g = case.tensors.values()
    for method, extras in (("gla", {"log_decay": g}), ("linear", {})):
        got, end = qkv.attention(q, k, v, method=method, form="kernel", return_state=True, **extras)
        want, state = qkv.attention(q, k, v, method=method, form="fast", return_state=True, **extras)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end["state"], state["state"], rtol=1e-5, atol=1e-5)
        assert end.seen == 20 and end.owner == method


@direct
def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(1, 2, 4, 8, device=DEVICE)
    wide = torch.randn(1, 1, 4, 300, device=DEVICE)
    for bad, why in (((x.double(),) * 3, "bfloat16, float16, float32"), ((wide,) * 3, "at most 256"),
                     ((x, x[:, :, :3], x), "G dividing H")):  # fmt: skip
        with pytest.raises(InvalidInput, match=why):
            decayed_linear_attention(*bad, form="triton")
    with pytest.raises(InvalidInput, match="`state` alone"):
        decayed_linear_attention(x, x, x, form="triton", keys=torch.zeros(1, 2, 8, device=DEVICE))
