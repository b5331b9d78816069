"""Operations on colour, in batch: planes uint8 (B, 3, S, S), one float64 value a sample.

The definitions are those of torchvision.transforms.v2.functional on uint8 tensors, to its order of rounding: it cuts off
fractions where it turns floats to bytes, and so do these.
"""

from __future__ import annotations

import torch

from pipelines.augment.draws import Op


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Floats in 0..255 to uint8, fractions cut off. By way of int16: torch has no vector code for the direct way."""
    return values.to(torch.int16).to(torch.uint8)


def per_sample(value: torch.Tensor) -> torch.Tensor:
    """(B,) as float32 (B, 1, 1, 1)."""
    return value.float().view(-1, 1, 1, 1)


def luma(planes: torch.Tensor) -> torch.Tensor:
    """Whole grey values of float planes (B, 3, S, S), float32 (B, 1, S, S)."""
    red, green, blue = planes.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def grayscale(planes: torch.Tensor) -> torch.Tensor:
    """Luma in all three channels: torchvision's rgb_to_grayscale."""
    return to_bytes(luma(planes.float())).expand_as(planes)


def saturation(planes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Between grey (factor 0) and the image (1), or beyond."""
    pixels = planes.float()
    grey = luma(pixels)
    return to_bytes(pixels.mul_(per_sample(factor)).addcmul_(grey, per_sample(1 - factor)).clamp_(0, 255))


def hue(planes: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the colour circle; the greatest and the least channel of each pixel, its value and chroma, stay.

    With the channels scaled to 0..1 between least and greatest, the hue is u = 1 + g + b - r sixths of a turn from red
    towards green where g >= b, and as much towards blue elsewhere. Without a mask: it vectorises on every device.
    """
    red, green, blue = planes.float().unbind(1)
    greatest = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = greatest - least
    sixths = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1)).add_(1)
    sixths = sixths.copysign_(green - blue).add_((6 * turn).float().view(-1, 1, 1))
    sixths.sub_((sixths / 6).round_(), alpha=6)  # to -3..3
    turned = torch.empty(planes.shape, device=planes.device)
    torch.addcmul(greatest, chroma, sixths.abs().sub_(1).clamp_(0, 1), value=-1, out=turned[:, 0])
    torch.addcmul(least, chroma, sixths.add(1).abs_().sub_(1).clamp_(0, 1), out=turned[:, 1])
    torch.addcmul(least, chroma, sixths.sub_(1).abs_().sub_(1).clamp_(0, 1), out=turned[:, 2])
    return to_bytes(turned.mul_(255.999 / 255))  # torchvision's way to bytes, here alone


def tables(op: Op, planes: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The new value of each old one, uint8 (B, 3, 256) or (B, 1, 256), for an operation that looks at one pixel at a time."""
    levels = torch.arange(256, dtype=torch.float32, device=planes.device).expand(len(planes), 1, 256)
    rest, value = (1 - value).float().view(-1, 1, 1), value.float().view(-1, 1, 1)
    match op:
        case Op.BRIGHTNESS:
            return to_bytes((levels * value).clamp_(0, 255))
        case Op.CONTRAST:
            mean = luma(planes.float()).mean(dim=(2, 3)).unsqueeze(2)
            return to_bytes((levels * value).addcmul_(mean, rest).clamp_(0, 255))
        case Op.POSTERIZE:
            return to_bytes((levels / value).floor_().mul_(value))
        case Op.SOLARIZE:
            return to_bytes(torch.where(levels >= value, 255 - levels, levels))
        case Op.SOLARIZE_ADD:
            return to_bytes(torch.where(levels < 128, (levels + value).clamp_(max=255), levels))
        case Op.INVERT:
            return to_bytes(255 - levels)
        case Op.AUTO_CONTRAST:
            return _auto_contrast(levels, planes)
        case Op.EQUALIZE:
            return _equalize(planes)
        case _:
            raise AssertionError(f"{op.name} is not computed by table")


def _auto_contrast(levels: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to 0..255; a channel of one value stays as it is."""
    flat = planes.flatten(2)
    least, greatest = flat.amin(2, keepdim=True).float(), flat.amax(2, keepdim=True).float()
    one_value = greatest == least
    span = ((greatest - least) * (1 / 255)).masked_fill_(one_value, 1)
    return to_bytes(((levels - least.masked_fill_(one_value, 0)) / span).clamp_(0, 255))


def _equalize(planes: torch.Tensor) -> torch.Tensor:
    """Pillow's histogram equalisation of each channel; one with too few pixels below its greatest value stays as it is."""
    pixels = planes.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=planes.device)
    counts.scatter_add_(2, pixels, counts.new_ones(1).expand(pixels.shape))
    below = counts.cumsum(2, dtype=torch.int32) - counts  # pixels darker than each level
    last = counts.gather(2, pixels.amax(2, keepdim=True))  # pixels of the greatest value
    step = (pixels.shape[2] - last).div_(255, rounding_mode="floor")
    spread = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    levels = torch.arange(256, dtype=torch.int32, device=planes.device)
    return torch.where(step == 0, levels, spread).to(torch.uint8)
