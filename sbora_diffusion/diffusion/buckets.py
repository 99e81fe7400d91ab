"""Aspect buckets: the sizes in which pictures that are no squares are trained.

Sizes of about one area, as in NovelAI's training (NovelAI/novelai-aspect-ratio-bucketing on GitHub)
and SDXL's (arXiv 2307.01952, section 2.3): what a batch takes does not depend on its bucket.
"""

import math

UNIT = 8
"""Latents that a bucket's sides are multiples of: families halve their latents at most thrice."""
LONGEST = 4.0
"""Of a side, times the other one."""

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(side: int, unit: int) -> list[Size]:
    """All buckets: sides are multiples of the unit, the area at most that of the square, and one of
    the sides could not be larger.

    Args:
        side: of the square.
        unit: in pixels.
    """
    most = max(1, side // unit) ** 2
    high = {(most // width, width) for width in range(1, most + 1)}
    sizes = sorted(high | {(w, h) for h, w in high})
    return [(unit * h, unit * w) for h, w in sizes if max(h, w) <= LONGEST * min(h, w)]


def bucket_of(picture: Size, side: int, unit: int) -> Size:
    """The bucket whose aspect is nearest to a picture's, of equally near ones the largest."""
    aspect = math.log(picture[1] / picture[0])

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(size[1] / size[0]) - aspect), -size[0] * size[1]

    return min(bucket_sizes(side, unit), key=distance)
