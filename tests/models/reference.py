"""ViTTM evaluated straight from weights under the authors' names: the specification's formulas, one after the other.

It shares no code with pipeline, and knows nothing but the formulas: what pipeline does otherwise (for speed, or to be
exported) must come to the same. Shapes: B batch, N tokens of the source, M of the query, T = N + M, D width, H heads.
"""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

LN_HEAD = LN_MEMORY_MLP = 1e-5  # of read/write heads and mlp memory blocks; all other norms have 1e-6
DEFAULTS = {
    "img_size": 224,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "memory_ps": 28,
    "process_ps": 28,
    "process_tokens": None,
    "process_embedder_type": "patch",
    "rw_head_type": "lin",
    "latent_size_scale": 4,
    "fusion_type": "residual",
    "memory_blocks": None,
    "memory_mlp_ratio": 0.5,
    "memory_encoder_depths": (3, 3),
    "memory_encoder_downsamples": (2, 1),
    "memory_decoder_depths": (3, 3),
    "reduced_dim": 2,
    "dyna_num_heads": 16,
    "dyna_concat": True,
    "init_values": None,
    "global_pool": "avg",
}


@dataclass(frozen=True)
class Weights:
    """Those whose names begin with `prefix`, and the layers that they make."""

    state: dict[str, Tensor]
    prefix: str = ""

    def __truediv__(self, name: object) -> "Weights":
        return Weights(self.state, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self["weight"], self["bias"])

    def norm(self, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"], eps)

    def mlp(self, x: Tensor) -> Tensor:
        return (self / "fc2").linear(F.gelu((self / "fc1").linear(x)))

    def patches(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self["weight"], self["bias"], stride=self["weight"].shape[-1])

    def conv1d(self, x: Tensor) -> Tensor:
        """Same padding, over (B, C, N); depthwise where the kernel is longer than 1."""
        size = self["weight"].shape[-1]
        return F.conv1d(x, self["weight"], self["bias"], padding=size // 2, groups=x.shape[1] if size > 1 else 1)


def features(state: dict[str, Tensor], config: dict, images: Tensor) -> tuple[Tensor, Tensor]:
    """(memory, process) tokens at the end."""
    config, weights = DEFAULTS | config, Weights(state)
    memory, process = _embed(weights, config, images)
    for i in range(config["depth"]):
        memory, process = _layer(weights, config, i, memory, process)
    if config["global_pool"] == "token":
        memory = (weights / "norm").norm(memory)
    return memory, (weights / "process_norm").norm(process)


def pre_logits(state: dict[str, Tensor], config: dict, memory: Tensor, process: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifiers are given, (B, D) each, of the tokens at the end."""
    weights = Weights(state)
    memory, process = memory.mean(1), (weights / "fc_norm_process").norm(process.mean(1))
    if (DEFAULTS | config)["global_pool"] == "avg":
        memory = (weights / "fc_norm").norm(memory)
    return memory, process


def logits(state: dict[str, Tensor], config: dict, memory: Tensor, process: Tensor) -> tuple[Tensor, Tensor]:
    memory, process = pre_logits(state, config, memory, process)
    weights = Weights(state)
    return (weights / "head").linear(memory), (weights / "process_head").linear(process)


def loss(state: dict[str, Tensor], config: dict, memory: Tensor, process: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of both heads, added up, as in training without any drop rate."""
    memory, process = logits(state, config, memory, process)
    return F.cross_entropy(memory, labels) + F.cross_entropy(process, labels)


def _embed(weights: Weights, config: dict, images: Tensor) -> tuple[Tensor, Tensor]:
    grid = (weights / "memory_embedder.proj").patches(images)  # (B, D, rows, columns)
    kind, tokens = config["process_embedder_type"], config["process_tokens"]
    if kind == "patch":
        process_grid = (weights / "process_embedder.proj").patches(images)
        process = _in_rows(process_grid) + _positions(weights["process_pos_embed"], process_grid, config, "process_ps")
    elif kind == "downsample":
        side = tokens or sides(config)[0] // config["process_ps"]
        process = _in_rows(F.adaptive_avg_pool2d(grid, (side, side))) + weights["process_pos_embed"]
    else:
        learned = weights["process_embedder.process_token"].expand(len(images), -1, -1)
        process = learned + weights["process_pos_embed"]
    return _in_rows(grid) + _positions(weights["memory_pos_embed"], grid, config, "memory_ps"), process


def _in_rows(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


def _positions(table: Tensor, grid: Tensor, config: dict, patch_size: str) -> Tensor:
    size = tuple(grid.shape[-2:])
    if size == tuple(side // config[patch_size] for side in sides(config)):
        return table
    side = isqrt(table.shape[1])
    assert side**2 == table.shape[1], "the specification resizes square tables"
    image = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return _in_rows(F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False))


def _layer(weights: Weights, config: dict, i: int, memory: Tensor, process: Tensor) -> tuple[Tensor, Tensor]:
    read_norm, write_norm = weights / "read_norm" / i, weights / "write_norm" / i
    memory, process = read_norm.norm(memory), read_norm.norm(process)
    read = _head(weights / "read_head" / i, config, memory, process)
    process = _fuse(weights / "read_fusion", config, read, process)
    conv = config["memory_blocks"] == "conv"
    if conv:
        kept = memory
        memory, sizes = _encode(weights / "mem_encoder" / i, config, memory)
    process = _block(weights / "blocks" / i, config, process)
    memory, process = write_norm.norm(memory), write_norm.norm(process)
    written = _head(weights / "write_head" / i, config, process, memory)
    memory = _fuse(weights / "write_fusion", config, written, memory)
    if conv:
        memory = kept + _decode(weights / "mem_decoder" / i, config, memory, sizes)
    elif config["memory_blocks"] == "mlp":
        block = weights / "mem_blocks" / i
        memory = memory + (block / "mlp").mlp((block / "norm").norm(memory, LN_MEMORY_MLP))
    return memory, process


def _block(weights: Weights, config: dict, x: Tensor) -> Tensor:
    scale1, scale2 = 1.0, 1.0
    if config["init_values"]:
        scale1, scale2 = weights["ls1.gamma"], weights["ls2.gamma"]
    qkv = (weights / "attn.qkv").linear((weights / "norm1").norm(x))
    q, k, v = (_split(part, config["num_heads"]) for part in qkv.chunk(3, dim=-1))
    attended = _merge((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    x = x + scale1 * (weights / "attn.proj").linear(attended)
    return x + scale2 * (weights / "mlp").mlp((weights / "norm2").norm(x))


def _split(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], num_heads, -1).permute(0, 2, 1, 3)


def _merge(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1, 3).flatten(2)


def _head(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    heads = {"lin": _lin, "ca": _ca, "la": _la, "lca": _lca, "tl": _tl, "dyna": _dyna}
    return heads[config["rw_head_type"]](weights, config, source, query)


def _lin(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    q, k = F.elu((weights / "q").linear(query)) + 1, F.elu((weights / "k").linear(source)) + 1
    q, k, v = (_split(x, config["num_heads"]) for x in (q, k, (weights / "v").linear(source)))
    return _merge(q @ (k.mT @ v) / ((q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6))


def _normed(weights: Weights, config: dict, source: Tensor, query: Tensor) -> list[Tensor]:
    given = {"q": query, "k": source, "v": source}
    normed = ((weights / f"{name}_norm").norm((weights / name).linear(x), LN_HEAD) for name, x in given.items())
    return [_split(x, config["num_heads"]) for x in normed]


def _ca(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    q, k, v = _normed(weights, config, source, query)
    return (weights / "proj").linear(_merge((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v))


def _lca(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    q, k, v = _normed(weights, config, source, query)
    return (weights / "proj").linear(_merge(q.softmax(-1) @ (k.softmax(-2).mT @ v)))


def _la(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    k = (weights / "mlp").mlp((weights / "norm").norm(source, LN_HEAD)).softmax(1)
    q = (weights / "mlp2").mlp((weights / "norm_q").norm(query, LN_HEAD)).softmax(-1)
    return q @ (k.mT @ source)


def _tl(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    tokens = torch.cat([source, query], 1)
    return (weights / "mlp").mlp((weights / "norm").norm(tokens, LN_HEAD)).mT.softmax(-1) @ tokens


def _dyna(weights: Weights, config: dict, source: Tensor, query: Tensor) -> Tensor:
    tokens = torch.cat([source, query], 1) if config["dyna_concat"] else source
    tokens = (weights / "norm").norm(tokens, LN_HEAD)
    (batch, num_tokens, _), num_heads = tokens.shape, config["dyna_num_heads"]
    compressed = (weights / "compress").linear(tokens).reshape(batch, num_tokens, num_heads, config["reduced_dim"])
    answers = []
    for head, share in enumerate(tokens.chunk(num_heads, dim=-1)):
        generated = (weights / "generate").linear(compressed[:, :, head].flatten(1))
        answers.append(generated.reshape(batch, query.shape[1], num_tokens).softmax(-1) @ share)
    return (weights / "out_proj").linear(torch.cat(answers, -1))


def _fuse(weights: Weights, config: dict, update: Tensor, stream: Tensor) -> Tensor:
    if config["fusion_type"] == "residual":
        return stream + update
    if config["fusion_type"] == "erase":
        return update
    gate = torch.sigmoid((weights / "linear").linear(update.mean(1)))[..., None]
    return stream * (1 - gate) + update * gate


def _encode(weights: Weights, config: dict, memory: Tensor) -> tuple[Tensor, list[int]]:
    x, sizes = (weights / "down_proj").conv1d(memory.mT), []
    for stage, stride in enumerate(config["memory_encoder_downsamples"]):
        sizes.append(x.shape[-1])
        if stride > 1:
            x = F.avg_pool1d(x, 2, stride, ceil_mode=True, count_include_pad=False)
        x = _stage(weights / "blocks" / (2 * stage + 1), config["memory_encoder_depths"][stage], x)
    return (weights / "up_proj").conv1d(x).mT, sizes


def _decode(weights: Weights, config: dict, memory: Tensor, sizes: list[int]) -> Tensor:
    x, sizes = (weights / "down_proj").conv1d(memory.mT), list(sizes)
    for stage, depth in enumerate(config["memory_decoder_depths"]):
        x = _stage(weights / "blocks" / (2 * stage), depth, x)
        x = F.interpolate(x, size=sizes.pop(), mode="nearest")
    return (weights / "up_proj").conv1d((weights / "mix").conv1d(x)).mT


def _stage(weights: Weights, depth: int, x: Tensor) -> Tensor:
    for i in range(depth):
        block = weights / i
        y = (block / "norm").norm((block / "conv_dw").conv1d(x).mT).mT
        y = F.gelu((block / "mlp.fc1").conv1d(y))
        length = y.square().sum(-1, keepdim=True).sqrt()
        share = length / (length.mean(1, keepdim=True) + 1e-6)
        y = y + block["mlp.grn.bias"][:, None] + block["mlp.grn.weight"][:, None] * y * share
        x = x + block["gamma"][:, None] * (block / "mlp.fc2").conv1d(y)
    return x


def sides(config: dict) -> tuple[int, int]:
    size = config["img_size"]
    return (size, size) if isinstance(size, int) else tuple(size)
