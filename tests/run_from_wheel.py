"""The demo's job from an installed package: `python -P run_from_wheel.py FOLDER`, started by `make wheels`."""

import sys
from pathlib import Path

QUESTION = "Is the circle on the left or right side of the triangle?"


def main() -> None:
    folder = Path(sys.argv[1])
    # The checkout, installed for development beside it, would lend the wheel what it lacks.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    import hide
    import hide_kernels
    from hide.methods.base import NoSettings
    from hide.present.pages import report_html
    from hide_kernels import native

    for package in (hide, hide_kernels):
        assert Path(package.__file__).is_relative_to(folder), f"{package.__file__} is not the wheel's"
    compiled = "none-any" not in folder.name
    assert (native.missing("cpu") is None) == compiled, native.missing("cpu")
    home = Path(hide.__file__).parent
    method = hide.HiDe.from_pretrained(home / "tiny" / "checkpoint", preset="tiny", device="cpu")
    plain = hide.Plain(method.model, method.preset.with_settings(NoSettings()))
    with method.open(home / "examples" / "scene.jpg") as session:
        before, answer = (one.ask(session, QUESTION) for one in (plain, method))
    assert (before.text, answer.text) == ("left", "right"), answer.to_dict()
    page = report_html(answer, plain=before, settings=method.preset.to_dict())
    assert "Is the circle" in page, "the pages' templates are there"
    print(
        f"{folder.name}: the circle is {answer.text} of the triangle; boxes {[boxes.tolist() for boxes in answer.boxes]}"
    )


if __name__ == "__main__":
    main()
