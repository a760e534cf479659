"""Read and write heads: how one stream of tokens takes from the other.

Shapes: B batch, N source tokens, M query tokens, T all tokens that are weighed, D width, H heads, d = D / H, c latent
width (of queries and keys).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pipeline.models.vittm.checks import check_choice, check_divides, check_positive

_EPS = 1e-6
_LA_HIDDEN = 64
_FEW = 2**20  # multiplications, below which their order is the formula's


@dataclass(frozen=True)
class HeadOptions:
    """Which heads a model has. Raises UserError for a type that there is not, and for sizes below 1."""

    rw_head_type: str
    num_heads: int
    latent_size_scale: int
    reduced_dim: int
    dyna_num_heads: int
    dyna_concat: bool

    def __post_init__(self) -> None:
        check_choice("rw_head_type", self.rw_head_type, RW_HEADS)
        for option in ("num_heads", "latent_size_scale", "reduced_dim", "dyna_num_heads"):
            check_positive(option, getattr(self, option))

    def build(self, dim: int, num_source: int, num_query: int) -> nn.Module:
        """A head called as head(source=(B, N, D), query=(B, M, D)) -> (B, M, D); N, M: `num_source`, `num_query`.

        Raises UserError where the width D = `dim` cannot be divided as the head needs it.
        """
        if self.rw_head_type == "tl":
            return TokenLearnerHead(dim, num_query)
        if self.rw_head_type == "dyna":
            num_weighed = num_source + num_query if self.dyna_concat else num_source
            return DynamicHead(dim, num_weighed, num_query, self.dyna_num_heads, self.reduced_dim, self.dyna_concat)
        return RW_HEADS[self.rw_head_type](dim, self.num_heads, self.latent_size_scale)


class LinearHead(nn.Module):
    """lin: linear attention, Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5, with narrow queries and keys.

    out = Q (K^T V) / (Q . sum_n K_n + 1e-6) a head, with phi = elu + 1 on Q and K. There is no output projection.
    """

    def __init__(self, dim: int, num_heads: int, latent_size_scale: int) -> None:
        super().__init__()
        latent_dim = _latent_dim(dim, num_heads, latent_size_scale)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, latent_dim)
        self.k = nn.Linear(dim, latent_dim)
        self.v = WeighedValues(dim, num_heads)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        q, k = _positive(self.q(query)), _positive(self.k(source))
        k_sum = k.sum(dim=1, keepdim=True)  # (B, 1, c)
        context = self.v(source, k, k_sum)
        # The norm divides Q (c wide) rather than the output (D wide).
        norm = _heads(q * k_sum, self.num_heads).sum(dim=-1, keepdim=True) + _EPS
        return _merge((_heads(q, self.num_heads) / norm).transpose(1, 2) @ context)

    def attention(self, source: Tensor, query: Tensor) -> Tensor:
        """The weights of the average that `forward` takes of V: (B, H, M, N), which sum to 1 over N."""
        q = _split(_positive(self.q(query)), self.num_heads)
        k = _split(_positive(self.k(source)), self.num_heads)
        weights = q @ k.transpose(-2, -1)
        return weights / (weights.sum(dim=-1, keepdim=True) + _EPS)


class WeighedValues(nn.Linear):
    """K^T V a head, of V = S Wv^T + bv. The product is a module because ZeRO-3 gathers weights for modules' calls."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, dim)
        self.num_heads = num_heads

    def forward(self, source: Tensor, k: Tensor, k_sum: Tensor) -> Tensor:  # type: ignore[override] # more goes in
        """S (B, N, D), K (B, N, c), its sum over N (B, 1, c) -> (B, H, c/H, d)."""
        if self._folds(source, k):
            return self._value_of_mean(source, k, k_sum)
        return _split(k, self.num_heads).transpose(-2, -1) @ _split(super().forward(source), self.num_heads)

    def _value_of_mean(self, source: Tensor, k: Tensor, k_sum: Tensor) -> Tensor:
        """The same as (K^T S) Wv^T + (sum_n K_n) bv: only c rows, not N, meet the D x D weights."""
        mixed = (k.transpose(1, 2) @ source).unflatten(1, (self.num_heads, -1))  # (B, H, c/H, D)
        weight = self.weight.unflatten(0, (self.num_heads, -1)).transpose(1, 2)  # (H, D, d)
        # One product a head for the whole batch, so that its weights are read once.
        context = mixed.transpose(0, 1).flatten(1, 2) @ weight
        context = context.unflatten(1, (source.shape[0], -1)).transpose(0, 1)
        k_sum = k_sum.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1)  # (B, H, c/H, 1)
        return torch.addcmul(context, k_sum, self.bias.unflatten(0, (self.num_heads, 1, -1)))

    def _folds(self, source: Tensor, k: Tensor) -> bool:
        """Whether `_value_of_mean` has fewer products, on a CPU, whose time they are: `tools/bench_model.py`.

        Elsewhere the larger product that shares its weights over the batch is kept, and where there are few products
        anyway the formula's order, to round as it does.
        """
        (num_tokens, dim), latent_dim = source.shape[1:], k.shape[-1]
        head_dim = dim // self.num_heads
        literal = num_tokens * dim * dim + num_tokens * latent_dim * head_dim
        folded = latent_dim * dim * (num_tokens + head_dim)
        return source.device.type == "cpu" and folded < literal and literal > _FEW


class CrossAttentionHead(nn.Module):
    """ca: softmax(Q K^T / sqrt(d)) V of normed Q, K and V, each D wide; output projection."""

    def __init__(self, dim: int, num_heads: int, latent_size_scale: int) -> None:
        """`latent_size_scale` is of the narrow heads; queries and keys have the full width here."""
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.v_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        q, k = self._queries_and_keys(source, query)
        v = _split(self.v_norm(self.v(source)), self.num_heads)
        return self.proj(_merge(F.scaled_dot_product_attention(q, k, v)))

    def attention(self, source: Tensor, query: Tensor) -> Tensor:
        """The weights of the average that `forward` takes of V: (B, H, M, N), which sum to 1 over N."""
        q, k = self._queries_and_keys(source, query)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)

    def _queries_and_keys(self, source: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, M, d), (B, H, N, d)."""
        q, k = self.q_norm(self.q(query)), self.k_norm(self.k(source))
        return _split(q, self.num_heads), _split(k, self.num_heads)


class LatentAttentionHead(nn.Module):
    """la: one head whose keys weigh the source's tokens, and whose queries weigh the c results; both by small MLPs."""

    def __init__(self, dim: int, num_heads: int, latent_size_scale: int) -> None:
        """There is one head, whatever `num_heads` the blocks have."""
        super().__init__()
        latent_dim = _latent_dim(dim, 1, latent_size_scale)
        self.norm, self.norm_q = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, _LA_HIDDEN, latent_dim)
        self.mlp2 = Mlp(dim, _LA_HIDDEN, latent_dim)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        return _product(*self._queries_and_keys(source, query), source)

    def attention(self, source: Tensor, query: Tensor) -> Tensor:
        """The weights of the average that `forward` takes of the source: (B, 1, M, N), which sum to 1 over N."""
        q, k = self._queries_and_keys(source, query)
        return (q @ k.transpose(-2, -1)).unsqueeze(1)

    def _queries_and_keys(self, source: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, c), which sum to 1 over c, and (B, N, c), which sum to 1 over N."""
        return self.mlp2(self.norm_q(query)).softmax(dim=-1), self.mlp(self.norm(source)).softmax(dim=1)


class LinearCrossAttentionHead(nn.Module):
    """lca: Q (K^T V) of normed Q, K (c wide) and V; softmax of Q over features and of K over tokens; projection.

    Efficient attention, Shen et al. 2021 (arXiv 1812.01243), eq. 2.
    """

    def __init__(self, dim: int, num_heads: int, latent_size_scale: int) -> None:
        super().__init__()
        latent_dim = _latent_dim(dim, num_heads, latent_size_scale)
        self.num_heads = num_heads
        self.q, self.k, self.v = nn.Linear(dim, latent_dim), nn.Linear(dim, latent_dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(latent_dim), nn.LayerNorm(latent_dim)
        self.v_norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        q, k = self._queries_and_keys(source, query)
        v = _split(self.v_norm(self.v(source)), self.num_heads)
        return self.proj(_merge(_product(q, k, v)))

    def attention(self, source: Tensor, query: Tensor) -> Tensor:
        """The weights of the average that `forward` takes of V: (B, H, M, N), which sum to 1 over N."""
        q, k = self._queries_and_keys(source, query)
        return q @ k.transpose(-2, -1)

    def _queries_and_keys(self, source: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, M, c/H), which sum to 1 over c/H, and (B, H, N, c/H), which sum to 1 over N."""
        q = _split(self.q_norm(self.q(query)), self.num_heads).softmax(dim=-1)
        k = _split(self.k_norm(self.k(source)), self.num_heads).softmax(dim=-2)
        return q, k


class TokenLearnerHead(nn.Module):
    """tl: each of the M results is an average of all tokens, weighed by an MLP of each token with M outputs.

    Token Turing Machines, Ryoo et al. 2023 (arXiv 2211.09119), section 3.1.
    """

    def __init__(self, dim: int, num_query: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, num_query, num_query)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        tokens = torch.cat((source, query), dim=1)
        weights = self.mlp(self.norm(tokens)).softmax(dim=1)  # (B, T, M)
        return weights.transpose(1, 2) @ tokens


class DynamicHead(nn.Module):
    """dyna: the T x M weights of each of h heads are made at once, from r features of every token.

    `concat`: the T tokens are source and query; else T = N, and the query is not looked at.
    Raises UserError unless `num_heads` = h divides D.
    """

    def __init__(
        self, dim: int, num_weighed: int, num_query: int, num_heads: int, reduced_dim: int, concat: bool
    ) -> None:
        super().__init__()
        check_divides("dyna_num_heads", num_heads, "embed_dim", dim, "a dyna head takes an equal share of the width")
        self.num_heads, self.num_query, self.concat = num_heads, num_query, concat
        self.norm = nn.LayerNorm(dim)
        self.compress = nn.Linear(dim, num_heads * reduced_dim)
        self.generate = nn.Linear(num_weighed * reduced_dim, num_weighed * num_query)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor, query: Tensor) -> Tensor:
        tokens = self.norm(torch.cat((source, query), dim=1) if self.concat else source)
        features = _split(self.compress(tokens), self.num_heads).flatten(2)  # (B, h, T r)
        weights = self.generate(features).unflatten(-1, (self.num_query, -1)).softmax(dim=-1)  # (B, h, M, T)
        return self.out_proj(_merge(weights @ _split(tokens, self.num_heads)))


RW_HEADS: dict[str, type[nn.Module]] = {
    "lin": LinearHead,
    "ca": CrossAttentionHead,
    "la": LatentAttentionHead,
    "lca": LinearCrossAttentionHead,
    "tl": TokenLearnerHead,
    "dyna": DynamicHead,
}


def _latent_dim(dim: int, num_heads: int, latent_size_scale: int) -> int:
    """c = D // `latent_size_scale`; raises UserError where that is 0, or H does not divide it."""
    latent_dim = dim // latent_size_scale
    check_positive("embed_dim // latent_size_scale", latent_dim)
    reason = "a read/write head takes an equal share of each"
    check_divides("num_heads", num_heads, "embed_dim // latent_size_scale", latent_dim, reason)
    return latent_dim


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, tokens, width) -> (B, tokens, H, width / H)."""
    return tokens.unflatten(-1, (num_heads, -1))


def _split(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, tokens, width) -> (B, H, tokens, width / H)."""
    return _heads(tokens, num_heads).transpose(1, 2)


def _merge(tokens: Tensor) -> Tensor:
    """(B, H, tokens, width / H) -> (B, tokens, width)."""
    return tokens.transpose(1, 2).flatten(2)


def _positive(x: Tensor) -> Tensor:
    """phi = elu + 1, without the -1 + 1 that in bf16 rounds exp(x) to 0 below x = -6.

    F.elu's backward also fails under torch.compile here (torch 2.12, aot_eager).
    """
    return F.relu(x) + x.clamp(max=0).exp()


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Q K^T V; q (..., M, c), k (..., N, c), v (..., N, d) -> (..., M, d).

    Many multiplications are made in the order in which they are fewer. A few are made in the formula's, to round as
    the authors' program does: with erase, what la reads differs so little from token to token that norms enlarge it.
    """
    (m, c), (n, d) = q.shape[-2:], v.shape[-2:]
    literal, other = (m + n) * c * d, m * n * (c + d)
    if other < literal and literal > _FEW:
        return (q @ k.transpose(-2, -1)) @ v
    return q @ (k.transpose(-2, -1) @ v)
