"""The lab's small convolutional autoencoder: 32x32 pixels to standardised 8x8x16 latents.

It exists because letters must stay sharp in few tokens. Autoencoders of others are in `vaes.py`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Autoencoder(nn.Module):
    """Four-fold downsampling; latents leave `encode` with mean 0 and variance 1 per channel.

    The standardisation is a batch norm without parameters, so its running statistics travel with
    the weights. In training, noise of standard deviation `latent_noise` makes the decoder forgive
    the small errors a generator makes.
    """

    def __init__(
        self, *, latent_channels: int = 16, width: int = 48, latent_noise: float = 0.1
    ) -> None:
        super().__init__()
        self.latent_noise = latent_noise
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, latent_channels, 1),
        )
        self.standardise = nn.BatchNorm2d(latent_channels, affine=False, momentum=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h4 w4"]:
        """Pixels in [-1, 1] to standardised latents."""
        return self.standardise(self.encoder(pixels).float())

    def decode(self, latents: Float[Tensor, "b c h4 w4"]) -> Float[Tensor, "b 3 h w"]:
        """Latents to pixels, nominally in [-1, 1]; not clamped, so that gradients pass."""
        return self.decoder(latents).float()

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        latents = self.encode(pixels)
        if self.training:
            latents = latents + self.latent_noise * torch.randn_like(latents)
        return self.decode(latents)


def reconstruction_loss(
    out: Float[Tensor, "b 3 h w"], pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """L1 of pixels plus L1 of their differences, which keeps letters and thin lines sharp."""
    error = out - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges
