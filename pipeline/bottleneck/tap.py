"""What a model was given, and its features, without another way into the model than to call it."""

from torch import Tensor, nn

from shards.errors import UserError


class Tap:
    """Keeps, until they are taken, the images float [B, 3, H, W] of a model's last call, and the pooled features
    [B, D] that its classifier was given: hooks, which every wrapper of the model leaves in place.

    Raises UserError for a model that has not one linear classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        classifier = model.get_classifier()  # type: ignore[operator] # every model of timm has it
        if not isinstance(classifier, nn.Linear):
            raise UserError(
                f"bottleneck.weight takes the features of one linear classifier, but a {type(model).__name__} has "
                f"{type(classifier).__name__}: set it to 0, or take a model with one head."
            )
        self.num_features = classifier.in_features
        model.register_forward_pre_hook(self._keep_images)
        classifier.register_forward_pre_hook(self._keep_features)

    def take(self) -> tuple[Tensor, Tensor]:
        """The images and the features of the last call, in fp32; they are let go of."""
        images, features = self._images, self._features
        del self._images, self._features
        return images.float(), features.float()

    def _keep_images(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._images = inputs[0]

    def _keep_features(self, classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]
