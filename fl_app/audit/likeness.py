"""How like two pictures are: squared error, peak signal-to-noise ratio, and structural similarity.

SSIM is that of Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error Visibility to Structural
Similarity", eq. 13, with even 7 × 7 windows (the whole picture where it is smaller) and K₁ = 0.01, K₂ = 0.03.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _K1, _K2 = 7, 0.01, 0.03


def squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean over pixels and channels, (n,) float64, of pictures (n, channels, height, width) within 0 … 1."""
    return ((first.double() - second.double()) ** 2).mean(dim=(1, 2, 3))


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """10·log₁₀(1 / squared error) in decibels, (n,) float64; at most 100 (equal ones). Shapes as `squared_error`."""
    return -10 * torch.log10(squared_error(first, second).clamp(min=1e-10))


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Mean structural similarity, (n,) float64, 1 for equal pictures. Shapes as `squared_error`."""
    x, y = first.double(), second.double()
    side = min(_WINDOW, *x.shape[2:])
    mean_x, mean_y = _means(x, side), _means(y, side)
    variance_x = _means(x * x, side) - mean_x**2
    variance_y = _means(y * y, side) - mean_y**2
    covariance = _means(x * y, side) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance_x + variance_y + _K2**2)
    return (alike * structure).mean(dim=(1, 2, 3))


def _means(pictures: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(pictures, side, stride=1)
