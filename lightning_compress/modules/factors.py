"""The two networks of factor transfer: a paraphraser for the teacher's feature, a translator for the student's.

Kim, Park & Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977. The layers are those of the authors' code (Jangho-Kim/Factor-Transfer-pytorch): no batch norm, and
a leaky ReLU after the last layer too; the second convolution changes the number of channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.functional._checks import check_positive, check_tensor, check_whole, shown

MOST_CHANNELS = 2**28
"""The bytes of a convolution between so many can still be counted in 64 bits."""


class Paraphraser(nn.Module):
    """An autoencoder over the channels of the teacher's last feature, trained without labels to reconstruct it.

    What lies between its two halves is the factor that the student imitates. Height and width never change.

    Args:
        channels: Channels m of the teacher's feature, 1 to 2^28.
        factor_ratio: Channels of the factor as a share k of ``channels``; positive, usually in (0, 1].

    Attributes:
        factor_channels: Channels of the factor, k * m rounded, at least 1.
        encoder: Convolutions m -> m, m -> k * m, k * m -> k * m.
        decoder: Transposed convolutions k * m -> k * m, k * m -> m, m -> m.

    Raises:
        ValueError: If ``channels`` is out of its range, or ``factor_ratio`` not positive and finite, or too large.

    Example:
        >>> import torch
        >>> paraphraser = Paraphraser(channels=8)
        >>> feature = torch.zeros(2, 8, 7, 7)
        >>> paraphraser(feature).shape, paraphraser.factor(feature).shape
        (torch.Size([2, 8, 7, 7]), torch.Size([2, 4, 7, 7]))
    """

    def __init__(self, channels: int, factor_ratio: float = 0.5) -> None:
        super().__init__()
        channels = _check_channels("channels", channels)
        ratio = check_positive("factor_ratio", factor_ratio, "positive and finite")
        if channels * ratio > MOST_CHANNELS:
            raise ValueError(
                f"factor_ratio must make at most {MOST_CHANNELS} of {channels} channels, got {shown(factor_ratio)}"
            )
        self.factor_channels = max(1, round(channels * ratio))
        self.encoder = _encoder(channels, self.factor_channels)
        self.decoder = nn.Sequential(
            *_layer(nn.ConvTranspose2d, self.factor_channels, self.factor_channels),
            *_layer(nn.ConvTranspose2d, self.factor_channels, channels),
            *_layer(nn.ConvTranspose2d, channels, channels),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Reconstruct the feature.

        Args:
            feature: Shape ``(N, channels, H, W)``.

        Returns:
            The reconstruction, same shape.

        Raises:
            TypeError: If ``feature`` is no tensor.
            ValueError: If it has another shape.
        """
        reconstruction: Tensor = self.decoder(self.factor(feature))
        return reconstruction

    def factor(self, feature: Tensor) -> Tensor:
        """Encode the feature.

        Args:
            feature: Shape ``(N, channels, H, W)``.

        Returns:
            The factor, shape ``(N, factor_channels, H, W)``.

        Raises:
            TypeError: If ``feature`` is no tensor.
            ValueError: If it has another shape.
        """
        factor: Tensor = self.encoder(_check_feature(feature, self.encoder))
        return factor


class Translator(nn.Module):
    """Three convolutions that turn the student's feature into a factor like the teacher's, trained with the student.

    Args:
        channels: Channels m of the student's feature, 1 to 2^28.
        factor_channels: Channels of the factor, those of the paraphraser; likewise.

    Attributes:
        encoder: Convolutions m -> m, m -> factor_channels, factor_channels -> factor_channels.

    Raises:
        ValueError: If a number of channels is out of its range.

    Example:
        >>> import torch
        >>> translator = Translator(channels=6, factor_channels=4)
        >>> translator(torch.zeros(2, 6, 7, 7)).shape
        torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        self.encoder = _encoder(
            _check_channels("channels", channels), _check_channels("factor_channels", factor_channels)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Translate the feature into a factor.

        Args:
            feature: Shape ``(N, channels, H, W)``.

        Returns:
            The factor, shape ``(N, factor_channels, H, W)``.

        Raises:
            TypeError: If ``feature`` is no tensor.
            ValueError: If it has another shape.
        """
        factor: Tensor = self.encoder(_check_feature(feature, self.encoder))
        return factor


def _encoder(channels: int, factor_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *_layer(nn.Conv2d, channels, channels),
        *_layer(nn.Conv2d, channels, factor_channels),
        *_layer(nn.Conv2d, factor_channels, factor_channels),
    )


def _layer(convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], inputs: int, outputs: int) -> list[nn.Module]:
    return [convolution(inputs, outputs, kernel_size=3, stride=1, padding=1), nn.LeakyReLU(0.1)]


def _check_channels(name: str, channels: int) -> int:
    return check_whole(name, channels, at_least=1, at_most=MOST_CHANNELS)


def _check_feature(feature: Tensor, encoder: nn.Sequential) -> Tensor:
    """Refuse what is no batch of images with the encoder's channels."""
    channels = encoder[0].in_channels
    if check_tensor("feature", feature).ndim != 4 or feature.shape[1] != channels:
        raise ValueError(f"feature must be (N, {channels}, H, W), got shape {tuple(feature.shape)}")
    return feature
