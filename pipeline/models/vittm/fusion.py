"""How what was read or written joins its stream: fusion(update, stream), both (B, K tokens, D) -> the same."""

from torch import Tensor, nn

from pipeline.models.vittm.checks import check_choice


class Residual(nn.Module):
    def forward(self, update: Tensor, stream: Tensor) -> Tensor:
        return stream + update


class Erase(nn.Module):
    def forward(self, update: Tensor, stream: Tensor) -> Tensor:
        return update


class AddErase(nn.Module):
    """A gate for each token, made of the mean update: g = sigmoid(W mean_tokens(r) + b), t (1 - g) + r g."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_tokens)

    def forward(self, update: Tensor, stream: Tensor) -> Tensor:
        gate = self.linear(update.mean(dim=1)).sigmoid().unsqueeze(-1)
        return stream * (1 - gate) + update * gate


FUSIONS = ("residual", "erase", "add_erase")


def build_fusion(fusion_type: str, dim: int, num_tokens: int) -> nn.Module:
    """The fusion of one direction, into a stream of `num_tokens` tokens. Raises UserError for a type that is not."""
    check_choice("fusion_type", fusion_type, FUSIONS)
    if fusion_type == "add_erase":
        return AddErase(dim, num_tokens)
    return Residual() if fusion_type == "residual" else Erase()
