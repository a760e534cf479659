"""Read and write heads: how one stream of tokens attends to the other.

Shapes: B batch, N source tokens, M query tokens, D width, H heads, c latent width (of queries and keys).
"""

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.vittm.checks import check_divides

_EPS = 1e-6


class LinearHead(nn.Module):
    """Linear attention, Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5, with narrow queries and keys.

    out = Q (K^T V) / (Q . sum_n K_n + 1e-6) a head, with phi = elu + 1 on Q and K. There is no output projection.
    Raises UserError where `latent_size_scale` does not divide D, or H does not divide c = D / latent_size_scale.
    """

    def __init__(self, dim: int, num_heads: int, latent_size_scale: int) -> None:
        super().__init__()
        check_divides("latent_size_scale", latent_size_scale, "embed_dim", dim, "queries and keys are a part of it")
        latent_dim = dim // latent_size_scale
        reason = "a head of the lin read/write attention takes an equal share of each"
        check_divides("num_heads", num_heads, "embed_dim // latent_size_scale", latent_dim, reason)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, latent_dim)
        self.k = nn.Linear(dim, latent_dim)
        self.v = nn.Linear(dim, dim)

    def forward(self, source: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """source (B, N, D), query (B, M, D) -> what the query takes from the source (B, M, D)."""
        q = self._split(_positive(self.q(query)))
        k = self._split(_positive(self.k(source)))
        v = self._split(self.v(source))
        # The norm divides Q (c wide) rather than the output (D wide), and K^T V comes first: linear in M and N.
        q = q / ((q * k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True) + _EPS)
        out = q @ (k.transpose(-2, -1) @ v)
        return out.transpose(1, 2).flatten(2)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, tokens, width) -> (B, H, tokens, width / H)."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _positive(x: torch.Tensor) -> torch.Tensor:
    """phi = elu + 1, without the -1 + 1 that in bf16 rounds exp(x) to 0 below x = -6.

    F.elu's backward after a split into heads also fails under torch.compile (torch 2.12, aot_eager).
    """
    return F.relu(x) + x.clamp(max=0).exp()


RW_HEADS: dict[str, type[LinearHead]] = {"lin": LinearHead}
