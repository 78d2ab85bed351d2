"""The models that the tests of fastlm.patch share."""

import torch
from torch import nn

DIM, SEQ = 32, 9


class Model(nn.Module):
    """A language model as PyTorch's tutorials write it, which knows nothing of fastlm."""

    def __init__(self, norm_first=True, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(50, DIM)
        layer = nn.TransformerEncoderLayer(
            DIM, 4, 48, dropout, "gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 48), nn.ReLU(), nn.Dropout(dropout), nn.Linear(48, DIM))
        self.decoder = nn.TransformerDecoderLayer(DIM, 4, 48, dropout, batch_first=True)
        self.head = nn.Linear(DIM, 50)

    def forward(self, embedded):
        """Embedded [batch, seq, DIM] -> logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(embedded.shape[1], dtype=embedded.dtype)
        encoded = self.encoder(embedded, mask=mask)
        return self.head(self.mlp(self.decoder(embedded, encoded, tgt_mask=mask)))


def inputs():
    return torch.randn(2, SEQ, DIM)


class OwnNorm(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, input):
        """The norm, plus one."""
        return super().forward(input) + 1
