"""What the tests of bad input ask of every op."""

import pytest

from fastlm.testing.compare import KernelCalls


def assert_told(op, arguments, error, words):
    """op(**arguments) raises `error` itself, its words begin with "<op>: <words>", and no kernel runs."""
    with KernelCalls() as calls, pytest.raises(error) as raised:
        op(**arguments)
    assert type(raised.value) is error
    assert str(raised.value).startswith(f"{op.__name__}: {words}")
    assert calls.names == []
