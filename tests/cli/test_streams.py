"""Standard output and error that are closed, full, or too narrow for what is printed."""

import io
import os
import subprocess
import sys

import pytest

from glm_jax.cli import main, streams
from tests.patience import HANG


def run(redirected: str, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that redirects its streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m glm_jax {command} {redirected}', sys.executable],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    for redirected, reason in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        done = run(redirected, "schedule", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: standard output cannot be written to ({reason}): send it elsewhere\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_errors_that_nobody_can_read_keep_their_exit_code() -> None:
    for redirected in ("2>/dev/full", "2>&-"):
        done = run(redirected, "nothing")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "中文é\udcff"
    for arguments, name in (
        (["config", "show", "--config=quickstart", f"--config.data.sources.x.path={text[:-1]}"], "stdout"),
        (["config", "show", f"--config={text}"], "stderr"),
        ([text], "stderr"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)
        assert main.main(arguments) in (0, 2)
        stream.flush()
        printed = stream.buffer.getvalue().decode(encoding)
        assert ("中文é" in printed) if encoding == "utf-8" else r"\u4e2d\u6587" in printed
        monkeypatch.undo()


def test_a_fault_that_is_not_the_outputs_is_not_blamed_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert not streams.refuses_output()
    assert capsys.readouterr().err == ""
