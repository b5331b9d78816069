"""Images that belong together, of one patient, camera or site: they stay in one split, or the test would measure memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipelines.common.errors import UserError
from pipelines.prepare.sources import Images
from pipelines.prepare.sources.dataset import numbered


def grouped(images: Images, split_by: str) -> Images:
    """Give each image its group.

    Args:
        images: The images of a split.
        split_by: 'group': the groups that the source gave. Else a regular expression with one group, searched in the names.

    Returns:
        The images, with `groups`.

    Raises:
        UserError: The source gives no groups, or the expression is not found in a name.
    """
    if split_by == "group":
        if images.groups is None:
            raise UserError("data.split_by: group, but the source gives none; set data.source.group to a column, or split_by to "
                            "a regular expression over the images' names, such as '(patient\\d+)'")
        return images
    pattern = re.compile(split_by)
    found = [pattern.search(name) for name in images.names]
    without = next((name for name, match in zip(images.names, found, strict=True) if match is None or match[1] is None), None)
    if without is not None:
        raise UserError(f"data.split_by: {split_by!r} is not found in the image's name {without!r}")
    names = [match[1] for match in found if match is not None]
    # A number that is the same in every split: refuse_shared_groups compares them.
    return replace(images, groups=np.array([int.from_bytes(_digest(name), "big") for name in names], dtype=np.int64))
