"""Methods on questions of one's own, scored: what `hide eval --data list:FILE` does, in Python.

python examples/evaluate_own_data.py [FOLDER for results.jsonl, where a killed run goes on]
"""

import sys
import tempfile
from functools import partial

from hide import HiDe, Plain
from hide.evaluation.data import Sample
from hide.evaluation.runner import ask_here, evaluate
from hide.evaluation.scoring import SCORERS
from hide.evaluation.store import ResultFile
from hide.evaluation.tables import method_table
from hide.questions import Question
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene


def main(folder: str) -> None:
    """Five drawn scenes, in which the model is asked which of two things is on the left."""
    samples = []
    for seed in range(3, 8):
        scene = draw_scene(seed, 700, 560, objects=4)
        left, *_, right = sorted(scene.objects, key=lambda thing: thing.box[0])
        question = Question.parse(f"Is the {left.kind} on the left or right side of the {right.kind}?")
        samples.append(Sample(str(seed), lambda scene=scene: scene.image, question, "left", split="sides"))
    hide = HiDe.from_pretrained(CHECKPOINT)
    with ResultFile(f"{folder}/results.jsonl", {"data": "five scenes"}) as results:
        evaluate(partial(ask_here, {"plain": Plain(hide.model), "hide": hide}), samples, results)
        print(method_table(list(results.records.values()), SCORERS["strict"]).markdown())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
