"""The demo's job from an installed package: `python -P run_from_wheel.py FOLDER`, started by `make wheels`."""

import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    # The checkout, installed for development beside it, would lend the wheel what it lacks.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    import hide
    import hide_kernels
    from hide.present.pages import report_html
    from hide_kernels import native

    for package in (hide, hide_kernels):
        assert Path(package.__file__).is_relative_to(folder), f"{package.__file__} is not the wheel's"
    compiled = "none-any" not in folder.name
    assert (native.missing("cpu") is None) == compiled, native.missing("cpu")
    home = Path(hide.__file__).parent
    model = hide.HiDe.from_pretrained(home / "tiny" / "checkpoint", preset="tiny", device="cpu")
    result = model.ask(home / "examples" / "scene.jpg", "Is the heart on the left or right side of the circle?")
    assert (result.plain_answer, result.answer) == ("right", "left"), result.to_dict()
    assert "Is the heart" in report_html(result, model.config), "the pages' templates are there"
    print(
        f"{folder.name}: the heart is {result.answer} of the circle; boxes {[boxes.tolist() for boxes in result.boxes]}"
    )


if __name__ == "__main__":
    main()
