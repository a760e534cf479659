"""The weights that the authors' program has for given options: names, shapes, and random values.

D width, c latent width of queries and keys, C = D / 4 channels of conv memory blocks.
"""

from math import ceil, prod

import torch
from reference import DEFAULTS, sides
from torch import Tensor

PATCH_EMBED = 16  # of the trunk that the authors' model inherits, and never runs

Shapes = dict[str, tuple[int, ...]]


def random_state(config: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Those weights with values on which every formula depends, the unused ones included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        if len(shape) > 1 and not name.endswith(("pos_embed", "token")):
            state[name] = noise * prod(shape[1:]) ** -0.5  # keeps the size of what it is multiplied by
        else:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if name.endswith("gamma") else 0.0
            state[name] = centre + 0.2 * noise
    return state


def shapes(config: dict) -> Shapes:
    """Name -> shape of every weight."""
    config = DEFAULTS | config
    dim, (memory, process, written) = config["embed_dim"], num_tokens(config)
    unused = prod(side // PATCH_EMBED for side in sides(config)) + 1
    found: Shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, unused, dim)}
    found |= {"memory_pos_embed": (1, memory, dim), "process_pos_embed": (1, process, dim)}
    found |= _conv("patch_embed.proj", config, PATCH_EMBED) | _conv("memory_embedder.proj", config, config["memory_ps"])
    if config["process_embedder_type"] == "patch":
        found |= _conv("process_embedder.proj", config, config["process_ps"])
    elif config["process_embedder_type"] == "latent":
        found["process_embedder.process_token"] = (1, process, dim)
    for i in range(config["depth"]):
        found |= _norm(f"read_norm.{i}", dim) | _norm(f"write_norm.{i}", dim) | _block(f"blocks.{i}", config)
        found |= _head(f"read_head.{i}", config, memory, process)
        found |= _head(f"write_head.{i}", config, process, written)
        found |= _memory_block(i, config)
    if config["fusion_type"] == "add_erase":
        found |= _linear("read_fusion.linear", process, dim) | _linear("write_fusion.linear", written, dim)
    for name in ("process_norm", "fc_norm_process", "fc_norm" if config["global_pool"] == "avg" else "norm"):
        found |= _norm(name, dim)
    return found | _linear("head", config["num_classes"], dim) | _linear("process_head", config["num_classes"], dim)


def num_tokens(config: dict) -> tuple[int, int, int]:
    """Of memory, of process, and of memory while it is written to."""
    memory, process = (prod(side // config[ps] for side in sides(config)) for ps in ("memory_ps", "process_ps"))
    if config["process_tokens"]:
        process = config["process_tokens"] ** (2 if config["process_embedder_type"] == "downsample" else 1)
    written = memory
    for stride in config["memory_encoder_downsamples"] if config["memory_blocks"] == "conv" else ():
        written = ceil(written / stride)
    return memory, process, written


def _linear(name: str, outputs: int, inputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _mlp(name: str, dim: int, hidden: int, outputs: int) -> Shapes:
    return _linear(f"{name}.fc1", hidden, dim) | _linear(f"{name}.fc2", outputs, hidden)


def _conv(name: str, config: dict, patch_size: int) -> Shapes:
    return _linear(name, config["embed_dim"], config["in_chans"], patch_size, patch_size)


def _block(name: str, config: dict) -> Shapes:
    dim = config["embed_dim"]
    found = _norm(f"{name}.norm1", dim) | _norm(f"{name}.norm2", dim)
    found |= _linear(f"{name}.attn.qkv", 3 * dim, dim) | _linear(f"{name}.attn.proj", dim, dim)
    found |= _mlp(f"{name}.mlp", dim, int(dim * config["mlp_ratio"]), dim)
    scales = {f"{name}.ls1.gamma": (dim,), f"{name}.ls2.gamma": (dim,)} if config["init_values"] else {}
    return found | scales


def _head(name: str, config: dict, source: int, query: int) -> Shapes:
    dim, kind = config["embed_dim"], config["rw_head_type"]
    latent = dim if kind == "ca" else dim // config["latent_size_scale"]
    if kind == "la":
        mlps = _mlp(f"{name}.mlp", dim, 64, latent) | _mlp(f"{name}.mlp2", dim, 64, latent)
        return mlps | _norm(f"{name}.norm", dim) | _norm(f"{name}.norm_q", dim)
    if kind == "tl":
        return _mlp(f"{name}.mlp", dim, query, query) | _norm(f"{name}.norm", dim)
    if kind == "dyna":
        tokens, reduced = source + query * config["dyna_concat"], config["reduced_dim"]
        found = _norm(f"{name}.norm", dim) | _linear(f"{name}.out_proj", dim, dim)
        found |= _linear(f"{name}.compress", config["dyna_num_heads"] * reduced, dim)
        return found | _linear(f"{name}.generate", tokens * query, tokens * reduced)
    found = _linear(f"{name}.q", latent, dim) | _linear(f"{name}.k", latent, dim) | _linear(f"{name}.v", dim, dim)
    norms = {} if kind == "lin" else {"q_norm": latent, "k_norm": latent, "v_norm": dim}
    for norm, width in norms.items():
        found |= _norm(f"{name}.{norm}", width)
    return found | _linear(f"{name}.proj", dim, dim)  # which lin creates, and never uses


def _memory_block(i: int, config: dict) -> Shapes:
    dim = config["embed_dim"]
    if config["memory_blocks"] == "mlp":
        name = f"mem_blocks.{i}"
        return _norm(f"{name}.norm", dim) | _mlp(f"{name}.mlp", dim, int(dim * config["memory_mlp_ratio"]), dim)
    if config["memory_blocks"] != "conv":
        return {}
    encoder, decoder, channels = f"mem_encoder.{i}", f"mem_decoder.{i}", dim // 4
    found = _linear(f"{decoder}.mix", channels, 1, 7)
    for name in (encoder, decoder):
        found |= _linear(f"{name}.down_proj", channels, dim, 1) | _linear(f"{name}.up_proj", dim, channels, 1)
    for stage, depth in enumerate(config["memory_encoder_depths"]):
        for block in range(depth):
            found |= _convnext(f"{encoder}.blocks.{2 * stage + 1}.{block}", channels)
    for stage, depth in enumerate(config["memory_decoder_depths"]):
        for block in range(depth):
            found |= _convnext(f"{decoder}.blocks.{2 * stage}.{block}", channels)
    return found


def _convnext(name: str, channels: int) -> Shapes:
    wide = 4 * channels
    found = (
        _linear(f"{name}.conv_dw", channels, 1, 7) | _norm(f"{name}.norm", channels) | {f"{name}.gamma": (channels,)}
    )
    found |= _linear(f"{name}.mlp.fc1", wide, channels, 1) | _linear(f"{name}.mlp.fc2", channels, wide, 1)
    return found | _norm(f"{name}.mlp.grn", wide)
