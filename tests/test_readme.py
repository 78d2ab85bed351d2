"""README.md says what the registry says."""

from pathlib import Path

from fastlm.cli.matrix import BEGIN, END, support_matrix

README = Path(__file__).parent.parent / "README.md"


def test_support_matrix_in_the_readme_is_the_generated_one():
    text = README.read_text(encoding="utf-8")
    told = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert told == support_matrix(), "paste what `fastlm doctor --markdown` prints between the markers"
