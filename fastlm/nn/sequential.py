"""Sequential: torch.nn.Sequential whose Linear, activation, (Dropout,) Linear chains are one op."""

from collections.abc import Sequence

from torch import Tensor, nn

from . import _fused
from .dropout import Dropout

_NO_DROPOUT = nn.Dropout(0.0)


def chain_at(children: Sequence[nn.Module], start: int) -> tuple[nn.Module, ...] | None:
    """(linear1, activation, dropout, linear2, number of children) of the plain chain at `start`, or None."""
    for steps in (4, 3):
        chain = children[start : start + steps]
        if len(chain) < steps:
            continue
        dropout = chain[2] if steps == 4 else _NO_DROPOUT
        plain = _fused.is_plain(chain[0], nn.Linear) and _fused.is_plain(chain[-1], nn.Linear)
        if plain and _fused.is_plain(dropout, nn.Dropout, Dropout) and _fused.activation_name(chain[1]):
            return chain[0], chain[1], dropout, chain[-1], steps
    return None


class Sequential(nn.Sequential):
    """Calls its children in turn; each Linear, activation, (Dropout,) Linear chain among them in one op.

    Constructor, children and state_dict of torch.nn.Sequential. A chain with a hook, or with a child that is
    subclassed or parametrised, is called child by child.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: what the first child takes; returns what the last one gives."""
        children = list(self)
        at = 0
        while at < len(children):
            chain = chain_at(children, at)
            if chain is None:
                input, at = children[at](input), at + 1
            else:
                *parts, steps = chain
                input, at = _fused.feed_forward(input, *parts), at + steps
        return input
