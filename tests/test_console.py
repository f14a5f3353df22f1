"""Output of the commands: no console's encoding stops it, and results are on the disk before it."""

import io
import json
import struct
import subprocess
import sys
import warnings

import pytest
import typer
from PIL import Image

from hide.cli import app
from hide.cli.console import App, errors

SHOWN = "星 ✓ ü 🅱 \udcff"


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")


def written(of):
    of.flush()
    return of.buffer.getvalue()


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("cp1252", b"\\u661f \\u2713 \xfc \\U0001f171 \\udcff\n"),
        ("ascii", b"\\u661f \\u2713 \\xfc \\U0001f171 \\udcff\n"),
        ("utf-8", "星 ✓ ü 🅱 \\udcff\n".encode()),
        ("utf-16", "星 ✓ ü 🅱 \\udcff\n".encode("utf-16")),
    ],
)
def test_what_a_console_lacks_is_written_as_escapes(monkeypatch, encoding, shown):
    small = App()

    @small.command()
    def say():
        for file in (sys.stdout, sys.stderr):
            print(SHOWN, file=file)

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream(encoding))
    small([], standalone_mode=False)
    assert written(sys.stdout) == written(sys.stderr) == shown


def test_without_a_console_nothing_is_printed_and_nothing_fails(monkeypatch):
    small = App()
    small.command()(lambda: typer.echo("star"))
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    small([], standalone_mode=False)


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["eval", "--help"]])
def test_help_is_printed_on_any_console(monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdout", stream("ascii"))
    app(arguments, standalone_mode=False)
    assert b"Usage" in written(sys.stdout)


def test_questions_and_options_of_any_writing_are_answered_and_saved_on_any_console(monkeypatch, tmp_path):
    Image.new("RGB", (280, 196), "red").save(tmp_path / "p.png")
    (tmp_path / "list.json").write_text(
        '[{"id": "星", "question": "What color is the 星?\\n(A) 红\\n(B) 蓝", "labels": "A", "image_path": "p.png"}]',
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "stdout", stream("cp1252"))
    monkeypatch.setattr(sys, "stderr", stream("cp1252"))
    app(["ask", str(tmp_path / "p.png"), "星星是什么颜色？", "--out", str(tmp_path)], standalone_mode=False)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["question"] == "星星是什么颜色？"
    assert b"\\u661f\\u661f" in written(sys.stdout)
    app(["eval", "--data", f"list:{tmp_path / 'list.json'}", "--out", str(tmp_path / "星")], standalone_mode=False)
    assert b"\\u661f" in written(sys.stdout) + written(sys.stderr)
    assert "1 questions, 0 failed" in (tmp_path / "星" / "summary.md").read_text(encoding="utf-8")


def test_tables_are_on_the_disk_before_they_are_printed(monkeypatch, tmp_path):
    from rich.console import Console

    from hide.cli import evaluate

    def fail(*_, **__):
        assert (tmp_path / "summary.md").is_file()
        raise BrokenPipeError

    monkeypatch.setattr(Console, "print", fail)
    with pytest.raises(BrokenPipeError):
        evaluate._finish(Console(), tmp_path, "title", [commands_table()], [])


def commands_table():
    from hide.present.table import ResultTable

    return ResultTable("table", ("a",), [("b",)])


def test_a_closed_pipe_is_quiet():
    code = "from hide.cli.console import App; import rich.console as r\na = App()\n"
    code += "a.command()(lambda: [r.Console().print('x' * 70) for _ in range(9999)] and None)\na()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=60)


def test_what_is_left_out_of_a_picture_is_a_note_of_the_command(capsys):
    from rich.console import Console

    from hide.images import load_image

    with errors(Console(stderr=True)):
        load_image(Image.new("F", (2, 2), 3000.0))
    said = capsys.readouterr().err
    assert said.startswith("note image: values of 3000 to 3000 are read as 0 (black) to 4095 (white)")
    assert said.count("\n") == 1


def test_what_pillow_warns_of_is_a_note_of_the_command(capsys):
    from rich.console import Console

    from hide.images import load_image

    # EXIF data whose first entry lies behind the file's end.
    entry = struct.pack("<HHII", 0x112, 5, 1, 0xFFFF)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0")
    with errors(Console(stderr=True)), warnings.catch_warnings():
        warnings.simplefilter("always")
        load_image(file.getvalue())
    assert capsys.readouterr().err == "note Truncated File Read\n"
