"""README.md says what the registry says, and the examples of docs/semantics.md print what they say."""

import doctest
from pathlib import Path

from fastlm.cli.matrix import BEGIN, END, support_matrix

README = Path(__file__).parent.parent / "README.md"


def test_support_matrix_in_the_readme_is_the_generated_one():
    text = README.read_text(encoding="utf-8")
    told = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert told == support_matrix(), "paste what `fastlm doctor --markdown` prints between the markers"


def test_examples_in_the_semantics_print_what_they_say():
    file = README.parent / "docs/semantics.md"
    found = doctest.testfile(str(file), module_relative=False, encoding="utf-8")
    assert found.attempted > 30 and found.failed == 0
