"""Decode and RandomResizedCrop on one core, ours against Pillow and torchvision's transforms: row 7 of README's table.

    uv run python tests/bench/decode.py --images FOLDER --json decode.json

Both get the same JPEG files, read before, and the same boxes (scale .08 to 1, ratio 3/4 to 4/3), and give uint8
(3, 224, 224).
``quality`` compares their pixels in steps of 255: largest difference (above 2 the row is missed), 99.9th percentile, mean.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from measure import finish, in_turns, median_ratio, parser, row
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from raydc.data.decode import decode
from raydc.data.transforms import crop_one

SIZE = 224


def textbook(data: bytes, box: tuple[int, int, int, int]) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return TF.pil_to_tensor(TF.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BILINEAR))


def ours(data: bytes, box: tuple[int, int, int, int]) -> torch.Tensor:
    return crop_one(decode(data), np.array(box), SIZE)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=Path, required=True, help="folder of JPEG files, searched through")
    options.add_argument("--num", type=int, default=400)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = sorted(file for file in arguments.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    images = [file.read_bytes() for file in files[:: max(1, len(files) // arguments.num)][: arguments.num]]
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    empty = [torch.empty(3, height, width) for width, height in sizes]
    boxes = [RandomResizedCrop.get_params(one, [0.08, 1.0], [3 / 4, 4 / 3]) for one in empty]

    def through(path) -> list[torch.Tensor]:
        return [path(data, box) for data, box in zip(images, boxes, strict=True)]

    gap = torch.stack(through(ours)).int().sub(torch.stack(through(textbook)).int()).abs().numpy()
    pairs = in_turns(lambda: through(textbook), lambda: through(ours), arguments.repeats)
    quality = {
        "largest": int(gap.max()),
        "p99.9": float(np.percentile(gap, 99.9)),
        "mean": round(float(gap.mean()), 3),
        "images_a_second": [round(len(images) / min(side)) for side in zip(*pairs, strict=True)],
    }
    one = row("7", median_ratio(pairs), 1.6, 3.0, quality)
    finish([one | {"ok": bool(one["ok"] and gap.max() <= 2)}], arguments.json)


if __name__ == "__main__":
    main()
