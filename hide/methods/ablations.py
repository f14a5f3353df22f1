"""What the parts of methods contribute: HiDe's boxes in another form than its collage, its maps without the noise
prior, the right boxes in HiDe's form, and Zoom-Refine's crop at a random place."""

from __future__ import annotations

import copy
import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hide.images import on_colour, to_image, to_tensor
from hide.methods.base import Answer, Evidence, Steps
from hide.methods.hide.method import EntityMaps, EntityRows, HiDe, Zoom
from hide.methods.zoom_refine.method import ZoomRefine
from hide.methods.zoom_refine.parse import Box
from hide.questions import Question
from hide.session import Session

BLACK = (0, 0, 0)
Fill = tuple[int, int, int] | None


class BoxesShown(HiDe):
    """HiDe up to its boxes, which are shown as a subclass draws them."""

    def pictures(self, session: Session, zoom: Zoom) -> list[Tensor | None]:
        """See `HiDe`."""
        return [
            to_tensor(self.draw(image, collage.boxes, self.settings.fill)) if len(collage.boxes) else None
            for image, collage in zip(session.images, zoom.collages, strict=True)
        ]

    @staticmethod
    @abstractmethod
    def draw(image: Image.Image, boxes: Tensor, fill: Fill) -> Image.Image:
        """What is shown beside an image with merged boxes (K, 4), K >= 1; fill: `HiDeConfig.fill`."""


class Tiles(BoxesShown):
    """No layout."""

    name: ClassVar[str] = "tiles"
    summary: ClassVar[str] = "the image, and HiDe's boxes in one row, the largest first: no layout"

    @staticmethod
    def draw(image: Image.Image, boxes: Tensor, fill: Fill) -> Image.Image:
        """The boxes side by side, the largest first, on `fill`, or black."""
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        whole = on_colour(image)
        crops = [whole.crop(box) for box in boxes[torch.argsort(area, descending=True, stable=True)].tolist()]
        row = Image.new("RGB", (sum(crop.width for crop in crops), max(crop.height for crop in crops)), fill or BLACK)
        left = 0
        for crop in crops:
            row.paste(crop, (left, 0))
            left += crop.width
        return row


class Masked(BoxesShown):
    """All of the layout."""

    name: ClassVar[str] = "masked"
    summary: ClassVar[str] = "the image, and a copy that is blank outside HiDe's boxes: nothing is deleted"

    @staticmethod
    def draw(image: Image.Image, boxes: Tensor, fill: Fill) -> Image.Image:
        """The whole image, `fill` or black outside the boxes."""
        inside = np.zeros((image.height, image.width), bool)
        for x0, y0, x1, y1 in boxes.tolist():
            inside[y0:y1, x0:x1] = True
        return Image.composite(
            on_colour(image),
            Image.new("RGB", image.size, fill or BLACK),
            Image.fromarray(inside.astype(np.uint8) * 255),
        )


class OneCrop(BoxesShown):
    """One box."""

    name: ClassVar[str] = "crop"
    summary: ClassVar[str] = "the image, and the one crop that holds all of HiDe's boxes"

    @staticmethod
    def draw(image: Image.Image, boxes: Tensor, fill: Fill) -> Image.Image:
        """The smallest crop that holds all boxes."""
        low, high = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
        return on_colour(image).crop((*low, *high))


class WithoutPrior(HiDe):
    """Attention as it is."""

    name: ClassVar[str] = "no-prior"
    summary: ClassVar[str] = "HiDe, with maps from which the noise prior is not subtracted"

    def maps(self, rows: EntityRows) -> EntityMaps:
        """See `HiDe`."""
        return super().maps(EntityRows(tuple(of_image[rows.prior_rows :] for of_image in rows.rows), 0, rows.labels))


class TrueBoxes(HiDe):
    """What perfect maps would give."""

    name: ClassVar[str] = "true-boxes"
    summary: ClassVar[str] = "the image, and the collage of the right boxes, where the data set has them"
    needs: ClassVar[frozenset[str]] = frozenset({"crop", "ask"})
    _boxes: Tensor | None = None

    def with_boxes(self, boxes: Sequence[Sequence[int]]) -> Self | None:
        """See `Method`."""
        if not boxes:
            return None
        bound = copy.copy(self)
        bound._boxes = torch.tensor(boxes)
        return bound

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`."""
        if self._boxes is None:
            raise ValueError("true-boxes: the right boxes are not known; give them with `with_boxes`")
        none = torch.zeros(0, 4, dtype=torch.int64)
        with steps("collage"):
            boxes = [self._boxes, *(none for _ in session.images[1:])]
            look = self.settings
            collages = session.crop(boxes, fill=look.fill, alpha_threshold=look.alpha_threshold)
        with steps("answer"):
            pictures = [collage.image for collage in collages if collage.image is not None]
            reply = self.reply(session, question, pictures)
        evidence = tuple(
            Evidence(collage.boxes, shown=None if collage.image is None else to_image(collage.image))
            for collage in collages
        )
        return Answer(reply.text, evidence)


class RandomBox(ZoomRefine):
    """A second look and no pointing."""

    name: ClassVar[str] = "zoom-refine-random"
    summary: ClassVar[str] = "Zoom-Refine with the box moved to a random place: a second look at anything"

    def read_box(self, reply: str, session: Session) -> Box | None:
        """A box as large as the one that the reply names; where it lies follows from the reply's text."""
        box = super().read_box(reply, session)
        if box is None:
            return None
        rng = random.Random(reply)
        width, height = box[2] - box[0], box[3] - box[1]
        x0, y0 = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        return x0, y0, min(1.0, x0 + width), min(1.0, y0 + height)
