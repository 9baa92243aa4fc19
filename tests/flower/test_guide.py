"""docs/flower.md shows the script's own lines, which a slow test runs."""

from tests.docs.conftest import ROOT
from tests.docs.pages import blocks

SCRIPT = ROOT / "examples" / "flower" / "run_local.sh"


def test_the_guides_steps_are_the_scripts() -> None:
    lines = {line.strip() for line in SCRIPT.read_text().splitlines()}
    shown = [
        line.strip()
        for block in blocks(ROOT / "docs" / "flower.md", "sh")
        for line in block.text.splitlines()
    ]
    assert len(shown) > 15
    assert [line for line in shown if line not in lines] == []
