"""The two networks of factor transfer: a paraphraser for the teacher's feature, a translator for the student's.

Kim, Park & Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977. The layers are those of the authors' code (Jangho-Kim/Factor-Transfer-pytorch): no batch norm, and
a leaky ReLU after the last layer too; the second convolution changes the number of channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.functional._checks import check_positive, check_whole


class Paraphraser(nn.Module):
    """An autoencoder over the channels of the teacher's last feature, trained without labels to reconstruct it.

    What lies between its two halves is the factor that the student imitates. Height and width never change.

    Args:
        channels: Channels m of the teacher's feature, a positive int.
        factor_ratio: Channels of the factor as a share k of ``channels``; positive, usually in (0, 1].

    Attributes:
        factor_channels: Channels of the factor, k * m rounded, at least 1.
        encoder: Convolutions m -> m, m -> k * m, k * m -> k * m.
        decoder: Transposed convolutions k * m -> k * m, k * m -> m, m -> m.

    Raises:
        ValueError: If ``channels`` is not a positive int or ``factor_ratio`` not positive and finite.

    Example:
        >>> import torch
        >>> paraphraser = Paraphraser(channels=8)
        >>> feature = torch.zeros(2, 8, 7, 7)
        >>> paraphraser(feature).shape, paraphraser.factor(feature).shape
        (torch.Size([2, 8, 7, 7]), torch.Size([2, 4, 7, 7]))
    """

    def __init__(self, channels: int, factor_ratio: float = 0.5) -> None:
        super().__init__()
        _check_channels("channels", channels)
        check_positive("factor_ratio", factor_ratio, "positive and finite")
        self.factor_channels = max(1, round(channels * factor_ratio))
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
        """
        reconstruction: Tensor = self.decoder(self.factor(feature))
        return reconstruction

    def factor(self, feature: Tensor) -> Tensor:
        """Encode the feature.

        Args:
            feature: Shape ``(N, channels, H, W)``.

        Returns:
            The factor, shape ``(N, factor_channels, H, W)``.
        """
        factor: Tensor = self.encoder(feature)
        return factor


class Translator(nn.Module):
    """Three convolutions that turn the student's feature into a factor like the teacher's, trained with the student.

    Args:
        channels: Channels m of the student's feature, a positive int.
        factor_channels: Channels of the factor, those of the paraphraser; a positive int.

    Attributes:
        encoder: Convolutions m -> m, m -> factor_channels, factor_channels -> factor_channels.

    Raises:
        ValueError: If a number of channels is not a positive int.

    Example:
        >>> import torch
        >>> translator = Translator(channels=6, factor_channels=4)
        >>> translator(torch.zeros(2, 6, 7, 7)).shape
        torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        _check_channels("channels", channels)
        _check_channels("factor_channels", factor_channels)
        self.encoder = _encoder(channels, factor_channels)

    def forward(self, feature: Tensor) -> Tensor:
        """Translate the feature into a factor.

        Args:
            feature: Shape ``(N, channels, H, W)``.

        Returns:
            The factor, shape ``(N, factor_channels, H, W)``.
        """
        factor: Tensor = self.encoder(feature)
        return factor


def _encoder(channels: int, factor_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *_layer(nn.Conv2d, channels, channels),
        *_layer(nn.Conv2d, channels, factor_channels),
        *_layer(nn.Conv2d, factor_channels, factor_channels),
    )


def _layer(convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], inputs: int, outputs: int) -> list[nn.Module]:
    return [convolution(inputs, outputs, kernel_size=3, stride=1, padding=1), nn.LeakyReLU(0.1)]


def _check_channels(name: str, channels: int) -> None:
    check_whole(name, channels, at_least=1)
