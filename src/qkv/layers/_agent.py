r"""The agent attention block of vision transformers: projections, bias tables on the grid, the `agent` operator, a convolution.

    out = W_o (agent(q, k, v; B1, B2) + DWC(v))

DWC is a 3 x 3 depthwise convolution of the values on the grid (3 along a sequence); class tokens take part in the attention but
neither in the agents' averages nor in the convolution. The tables belong to the grid of training and are resized for others.

Axes: B batch, N tokens, W width, H heads, n agents. Han et al. 2023, arXiv:2312.08874.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops._common.grids import Depthwise
from qkv.ops.agent import Agent, key_bias, query_bias


@final
class AgentAttention(nn.Module):
    """Mixes tokens ``[B, N, W] -> [B, N, W]``.

    width: W. grid: rows and columns in training, None for a sequence (then without tables). num_agents: a square on a grid.
    prefix: class tokens before the grid. table: side of the stored tables. Raises `InvalidParameter`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        num_agents: int = 49,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        table: int = 7,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InvalidParameter(f"AgentAttention: width={width} must be a multiple of heads={heads}")
        if prefix and grid is None:
            raise InvalidParameter(f"AgentAttention: prefix={prefix} class tokens stand before a grid; give one")
        self.heads, self.prefix, self.grid = heads, prefix, None if grid is None else tuple(grid)
        self.operator = Agent(num_agents=num_agents, grid=self.grid, prefix=prefix)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.conv = Depthwise(width, 3, axes=1 if grid is None else 2)
        self.tables = nn.ParameterDict()
        if self.grid is not None:
            h, w, n = *self.grid, num_agents
            shapes = {
                "an": (n, table, table),
                "ah": (n, h),
                "aw": (n, w),
                "na": (n, table, table),
                "ha": (h, n),
                "wa": (w, n),
            }
            shapes |= {"ac": (n, prefix), "ca": (prefix, n)} if prefix else {}
            for name, shape in shapes.items():
                self.tables[name] = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, *shape), std=0.02))

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Tokens ``[B, N, W]``; grid: of this image, where it is not that of training. Raises `InvalidInput`."""
        grid = self.grid if grid is None else tuple(grid)
        if (grid is None) != (self.grid is None):
            raise InvalidInput(f"AgentAttention was made for grid={self.grid}; it cannot take grid={grid}")
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if grid is None:
            y = self.operator(q, k, v, causal=False) + self.conv(v, (x.shape[1],))
            return self.out(y.transpose(1, 2).flatten(2))
        t: Any = self.tables
        bias = {
            "bias_keys": key_bias(t["an"], t["ah"], t["aw"], grid, t["ac"] if self.prefix else None),
            "bias_queries": query_bias(t["na"], t["ha"], t["wa"], grid, t["ca"] if self.prefix else None),
        }
        operator = self.operator if grid == self.grid else self.operator.replace(grid=grid)
        y = operator(q, k, v, causal=False, **bias)  # type: ignore[operator]
        y = y + F.pad(self.conv(v[:, :, self.prefix :], grid), (0, 0, self.prefix, 0))
        return self.out(y.transpose(1, 2).flatten(2))
