"""What the simulator raises: a program that it cannot run, and one that does what a GPU would not forgive."""


class UnknownInstruction(NotImplementedError):
    """An instruction form that no one has written and tested: nothing is guessed."""


class SimulationError(AssertionError):
    """A finding: out of bounds, misaligned, poison, race, divergence, an asynchronous copy used too early.

    kind: "bounds", "alignment", "poison", "race", "divergence", "async" or "launch".
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
