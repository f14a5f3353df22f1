"""The functions of published HiDe code (arXiv 2510.00054) under their names, on this project's operators.

Code that was written for them gets faster with two lines and stays as it is otherwise::

    from hide import drop_in

    drop_in.install(Get_box)  # the modules whose functions call these names

`docs/accelerate_hide.md` says what changes and what does not.
"""

from hide.drop_in.attention import patch_attention
from hide.drop_in.install import Replaced, install, installed
from hide.drop_in.internvl import process_notsave
from hide.drop_in.qwen import (
    compact_and_center_with_relative_pos,
    decompose_bbox_by_alpha,
    find_top_n_attended_regions,
    from_img_and_att_get_cropbox,
    merge_overlapping_bboxes,
    process,
)

__all__ = [
    "Replaced",
    "compact_and_center_with_relative_pos",
    "decompose_bbox_by_alpha",
    "find_top_n_attended_regions",
    "from_img_and_att_get_cropbox",
    "install",
    "installed",
    "merge_overlapping_bboxes",
    "patch_attention",
    "process",
    "process_notsave",
]
